"""Tables and pictures from result rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import TITLES, UNIT
from .record import Row

#: Providers that tell this project's step; the first found is what others are compared with.
OURS = ("dtokd", "dtokd cuda", "dtokd cuda two launches", "dtokd triton", "dtokd cpu")
#: Colors that people with any color vision tell apart (Okabe and Ito, 2008).
COLORS = {"interior": "#0072B2", "vertex": "#E69F00", "eager": "#0072B2", "graph": "#E69F00"}


def step_tables(rows: Sequence[Row]) -> str:
    """Markdown: the machine, its bandwidth, ratios per case and number of threads, traffic, memory."""
    rows = list(rows)
    step = [row for row in rows if row["kernel_name"] == "step"]
    parts = [_facts(rows)]
    for threads in _distinct(step, "threads"):
        for kind in _distinct(step, "kernel_operation_mode"):
            chosen = _select(step, threads=threads, kernel_operation_mode=kind)
            if _select(chosen, metric_name="ratio"):
                parts.append(f"### {kind} case, {_counted(threads)}\n\n{_ratios(chosen)}")
    if memory := _select(step, metric_name="memory"):
        parts.append(f"### Extra memory at the peak of a step, MB\n\n{_grid(memory, lambda r: _value(r, '.2f'))}")
    return "\n\n".join(parts)


def gpu_tables(rows: Sequence[Row]) -> str:
    """Markdown: what was measured on a GPU so far; a table that has no row yet is left out."""
    if not rows:
        return "Nothing was measured."
    parts = [_machine(rows[0])]
    facts = [row for row in rows if row["kernel_name"] == "probe"]
    parts += ["\n".join(f"- {r['kernel_provider']}: {_value(r, '.4g')} {r['metric_unit']}".rstrip() for r in facts)]
    steps = _select(rows, kernel_name="step")
    for mode, title in (("graph", "A step replayed from a graph"), ("eager", "A step, eager")):
        for metric, spec, unit in (
            ("ratio", ".2f", "times of torch's fused AdamW with one gradient, median (20 to 80 %)"),
            ("time", ".4f", "milliseconds"),
            ("bandwidth", ".0f", "GB/s"),
            ("host", ".4f", "milliseconds until the host may go on"),
        ):
            if found := _select(steps, kernel_operation_mode=mode, metric_name=metric):
                shown = _ratio_cell if metric == "ratio" else (lambda row, spec=spec: _value(row, spec))
                parts.append(f"### {title}: {unit}\n\n{_grid(found, shown)}")
    if found := _select(rows, kernel_name="kernel", metric_name="time"):
        lines = []
        for row in found:
            of = {key: row[key] for key in ("kernel_provider", "kernel_operation_mode", "x_value")}
            others = (_select(rows, kernel_name="kernel", metric_name=name, **of) for name in ("bytes", "model"))
            lines.append([*of.values(), _value(row, ".1f"), *(_value(o[0], ".4g") if o else "" for o in others)])
        head = "| kernel | of | model | us | B/parameter | us by a copy's speed |"
        parts.append("### Kernels\n\n" + table(head, lines))
    iterations = _select(rows, kernel_name="iteration")
    for mode in _distinct(iterations, "kernel_operation_mode"):
        found = _select(iterations, kernel_operation_mode=mode)
        ratios = {row["kernel_provider"]: _ratio_cell(row) for row in _select(found, metric_name="ratio")}
        times = {row["kernel_provider"]: _value(row, ".2f") for row in _select(found, metric_name="time")}
        lines = [[name, time, ratios.get(name, "")] for name, time in times.items()]
        head = "| | ms | ratio to the weighted sum |"
        parts.append(f"### Iterations, {mode}: {_config(found[0])}\n\n{table(head, lines)}")
    return "\n\n".join(part for part in parts if part)


def gpu_line(rows: Sequence[Row]) -> str:
    """A sentence: what a step takes on a GPU, over torch's fused AdamW."""
    found = _select(rows, kernel_name="step", kernel_operation_mode="graph", metric_name="ratio")
    found = [row for row in found if row["kernel_provider"] == "dtokd cuda"]
    if not found:
        return "No GPU figure has been measured."
    ratios = ", ".join(f"{_value(row, '.2f')} ({row['x_value']})" for row in found)
    return (
        f"On one {found[0]['gpu_name']} a step with two gradients, replayed from a graph, takes this many times what "
        f"torch's fused AdamW takes with one: {ratios} (`runs/gpu/gpu.csv`)."
    )


def _ratio_cell(row: Row, spec: str = ".2f") -> str:
    return f"{_value(row, spec)} ({_spread(row, spec)})"


def table(head: str, lines: Iterable[Sequence[str]]) -> str:
    """Markdown: a line of cells each, below the line of heads."""
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *(f"| {' | '.join(cells)} |" for cells in lines)])


def ranks_table(rows: Sequence[Row]) -> str:
    """Markdown: bytes sent per rank and step beside the model's; times, where processes had a core each."""
    names = {"naive": "naive", "replicas": "`attach`", "sharded": "`attach(shard=True)`"}
    lines = []
    for mode in _distinct(rows, "kernel_operation_mode"):
        for way in _distinct(rows, "kernel_provider"):
            of = {r["metric_name"]: r for r in _select(rows, kernel_operation_mode=mode, kernel_provider=way)}
            sent, model = (float(of[metric]["y_value_50"]) for metric in ("sent", "model"))
            cells = [mode.split()[0], names[way], f"{sent:.2f}", f"{model:.2f}", f"{sent / model - 1:+.2%}"]
            cells += [_value(of["time"], ".0f"), _value(of["ratio"], ".2f")] if "time" in of else ["", ""]
            lines.append(cells)
    head = "| ranks | way | sent, MB | model, MB | difference | ms per step | of naive |"
    return f"{_machine(rows[0])} {rows[0]['x_value']}; {_config(rows[0])}.\n\n{table(head, lines)}"


def sources_tables(rows: Sequence[Row]) -> str:
    """Markdown: what the sources of the Gram matrix cost, and how close they come; of the parts that were measured.

    The order is that of the document: cost, then closeness.
    """
    return "\n\n".join(table for table in sources_parts(rows).values() if table)


def sources_parts(rows: Sequence[Row]) -> dict[str, str]:
    """The tables of `sources_tables` by name: "iterations", "steps", "closeness"."""
    iterations, steps, closeness = (_select(rows, kernel_name=name) for name in ("iteration", "step left", "closeness"))
    parts = {
        "iterations": [
            _iterations(_select(iterations, kernel_operation_mode=mode))
            for mode in _distinct(iterations, "kernel_operation_mode")
        ],
        "steps": [
            "Times of torch's fused AdamW with one gradient: median, 20 and 80 % quantile.",
            _grid(_select(steps, metric_name="ratio"), _ratio_cell),
        ],
        "closeness": [
            _closeness(_select(closeness, kernel_operation_mode=objective), objective)
            for objective in _distinct(closeness, "kernel_operation_mode")
        ],
    }
    measured = {"iterations": iterations, "steps": steps, "closeness": closeness}
    return {name: "\n\n".join([_machine(found[0]), *parts[name]]) if found else "" for name, found in measured.items()}


def _iterations(rows: Sequence[Row]) -> str:
    lines = []
    for name in _distinct(_select(rows, metric_name="iteration"), "kernel_provider"):
        found = {row["metric_name"]: row for row in _select(rows, kernel_provider=name)}
        cells = [_value(found[part], ".1f" if part == "step" else ".0f") for part in ("forward", "backward", "step")]
        lines.append([name, *cells, _ratio_cell(found["ratio"], ".3f")])
    head = "| | forward, ms | backward, ms | step, ms | ratio to the weighted sum |"
    text = [f"{_config(rows[0])}, {_counted(rows[0]['threads'])}.", table(head, lines)]
    bounded = _select(rows, kernel_provider="exact", metric_name="ratio to sum and a second backward")
    if bounded:
        hooked = _select(rows, kernel_provider="overlap", metric_name="backward / exact's")[0]
        text.append(
            "Exact, over the weighted sum's iteration and one more of its backward passes: "
            f"{_ratio_cell(bounded[0], '.3f')}. Backward passes of overlap, products included, over those of exact: "
            f"{_ratio_cell(hooked, '.3f')}."
        )
    return "\n\n".join(text)


def _closeness(rows: Sequence[Row], objective: str) -> str:
    head = "| | mean weight | mean error | correlation | accuracy, % | accuracy - exact, points |"
    lines = []
    for name in _distinct(rows, "kernel_provider"):
        found = {row["metric_name"]: row for row in _select(rows, kernel_provider=name)}
        lines.append([name, *(_number(found.get(metric), spec) for metric, spec in _CLOSENESS.items())])
    return f"### {objective.capitalize()} distillation\n\n{_config(rows[0])}.\n\n{table(head, lines)}"


_CLOSENESS = {"mean weight": ".2f", "error": ".3f", "correlation": ".2f", "accuracy": ".1f", "accuracy - exact": "+.1f"}


def _number(row: Row | None, spec: str) -> str:
    if row is None:
        return ""
    if float(row["y_value_50"]) != float(row["y_value_50"]):  # NaN
        return "-"
    return _ratio_cell(row, spec)


def _config(row: Row) -> str:
    return row["extra_benchmark_config_str"]


def _machine(row: Row) -> str:
    where = f"{row['gpu_name']}, CUDA {row['cuda']}" if row["gpu_name"] else row["cpu"]
    return f"{where}; torch {row['torch']}; {row['timestamp'][:10]}; commit {row['git_sha']}."


def _facts(rows: Sequence[Row]) -> str:
    lines = [_machine(rows[0])]
    for row in _select(rows, metric_name="bandwidth", kernel_name="probe"):
        lines.append(
            f"- {row['kernel_provider']}, {_counted(row['threads'])}: {_value(row, '.1f')} GB/s ({_spread(row, '.1f')})"
        )
    loads = [float(row["y_value_50"]) for row in _select(rows, metric_name="load")]
    if loads:
        lines.append(f"- other processes meanwhile used {min(loads):.2f} to {max(loads):.2f} cores")
    return "\n".join(lines)


def _ratios(rows: Sequence[Row]) -> str:
    """Ratios to the unit with their spread; milliseconds beside dtokd's; what the counted bytes allow."""
    times = _select(rows, metric_name="time")
    ours = {row["x_value"]: float(row["y_value_50"]) for row in _select(times, kernel_provider=_ours(rows))}
    moved, read = byte_counts(rows, ("reads", "writes")), byte_counts(rows, ("reads",))
    digits = ".3f" if rows[0]["gpu_name"] else ".1f"
    return "\n\n".join(
        [
            "Ratio to the unit: median, 20 and 80 % quantile.",
            _grid(_select(rows, metric_name="ratio"), _ratio_cell),
            f"dtokd moves {moved[0]} bytes per parameter, the unit {moved[1]}: {moved[0] / moved[1]:.2f}. "
            f"It reads {read[0]}, the unit {read[1]}: {read[0] / read[1]:.2f}.",
            "Milliseconds, and how often dtokd's fit in there.",
            _grid(times, lambda r: f"{_value(r, digits)}, {float(r['y_value_50']) / ours[r['x_value']]:.2f} x"),
            "GB/s moved.",
            _grid(_select(rows, metric_name="bandwidth"), lambda r: _value(r, ".0f")),
        ]
    )


def _ours(rows: Sequence[Row]) -> str:
    there = _distinct(rows, "kernel_provider")
    return next(name for name in OURS if name in there)


def byte_counts(rows: Iterable[Row], metrics: Sequence[str]) -> tuple[int, int]:
    """Bytes per parameter of dtokd and of the unit, summed over these metrics; of those that are counted."""
    counted = [row for row in rows if row["metric_name"] in metrics]
    counts = [
        sum(int(_select(counted, kernel_provider=name, metric_name=metric)[0]["y_value_50"]) for metric in metrics)
        for name in (_ours(counted), UNIT)
    ]
    return counts[0], counts[1]


def _grid(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """A line per competitor, a column per model; empty where there is no such row."""
    models = _distinct(rows, "x_value")
    lines = []
    for name in _distinct(rows, "kernel_provider"):
        found = {row["x_value"]: row for row in _select(rows, kernel_provider=name)}
        lines.append([TITLES.get(name, name), *(cell(found[model]) if model in found else "" for model in models)])
    return table(f"| | {' | '.join(models)} |", lines)


def plot_ratios(rows: Sequence[Row], path: Path) -> None:
    """Ratios with their 20 % and 80 % quantiles, a panel per model and number of threads; lines: what bytes allow."""
    ratios = _select(rows, metric_name="ratio")
    models, threads = _distinct(ratios, "x_value"), _distinct(ratios, "threads")
    kinds = _distinct(ratios, "kernel_operation_mode")
    names = [name for name in _distinct(ratios, "kernel_provider") if name != UNIT]
    height = max(3.6, 0.4 * len(names))
    figure = Figure(figsize=(4 + 3.2 * len(models), 1.2 + height * len(threads)), layout="constrained")
    axes = figure.subplots(len(threads), len(models), sharex=True, sharey=True, squeeze=False)
    for line, t in zip(axes, threads, strict=True):
        for ax, model in zip(line, models, strict=True):
            for offset, kind in zip((-0.16, 0.16), kinds, strict=False):
                panel = _select(rows, x_value=model, threads=t, kernel_operation_mode=kind)
                _draw_panel(ax, panel, names, offset, COLORS[kind], kind)
            ax.set_title(f"{model}, {_counted(t)}")
            ax.grid(axis="x", color="0.9")
    ax = axes[0, 0]
    ax.set_yticks(range(len(names)), labels=[TITLES.get(name, name) for name in names])
    ax.invert_yaxis()
    ax.set_xscale("log", base=2)
    low, high = (pick(float(row[f"y_value_{q}"]) for row in ratios) for pick, q in ((min, 20), (max, 80)))
    ax.set_xlim(min(1, 0.95 * low), 1.7 * high)
    ax.xaxis.set_major_formatter("{x:g}")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2 * len(kinds))
    figure.supxlabel("time of a step / time of torch's fused AdamW with one gradient")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_panel(ax: Axes, rows: Sequence[Row], names: Sequence[str], offset: float, color: str, kind: str) -> None:
    found = {row["kernel_provider"]: row for row in _select(rows, metric_name="ratio")}
    lines = [y + offset for y, name in enumerate(names) if name in found]
    names = [name for name in names if name in found]
    middle, low, high = ([float(found[name][f"y_value_{q}"]) for name in names] for q in (50, 20, 80))
    whiskers = [
        [m - x for m, x in zip(middle, low, strict=True)],
        [x - m for m, x in zip(middle, high, strict=True)],
    ]
    ax.errorbar(middle, lines, xerr=whiskers, fmt="o", color=color, capsize=3, markersize=4, label=f"{kind} case")
    for value, x, y in zip(middle, high, lines, strict=True):
        ax.annotate(f"{value:.2f}", (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize="x-small")
    ours, unit = byte_counts(rows, ("reads", "writes"))
    ax.axvline(ours / unit, color=color, linestyle="--", label=f"{ours}/{unit} bytes moved")


def _select(rows: Iterable[Row], **columns: str) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in columns.items())]


def _distinct(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _value(row: Row, spec: str) -> str:
    return format(float(row["y_value_50"]), spec)


def _spread(row: Row, spec: str) -> str:
    return f"{float(row['y_value_20']):{spec}} to {float(row['y_value_80']):{spec}}"


def _counted(threads: str) -> str:
    return f"{threads} thread" + ("s" if threads != "1" else "")
