"""`report.html`: one file with all that a run directory tells, for a screen of any size."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..metric import best_of, is_lower_better
from ..texts import parse_json
from ..train.about import read_about
from .chart import COLOURS, line_chart
from .classes import classes_part, read_classes
from .columns import read_columns
from .conclusion import Baseline, read_baseline, sentences

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #62666d; --back: #fff; --line: #dcdfe4;
  --s0: #0b62c4; --s1: #c2410c; --s2: #15803d; --s3: #7c3aed; --s4: #a16207; --s5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #9aa0a8; --back: #16181b; --line: #363a40;
  --s0: #6cb1ff; --s1: #ff9b6a; --s2: #62d58a; --s3: #b79bff; --s4: #e6bd4f; --s5: #55cfe6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p { max-width: 48rem; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .7rem; min-width: 0; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .mark { stroke: var(--soft); stroke-dasharray: 4 4; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; color: var(--soft); }
polyline.dashed { stroke-dasharray: 6 4; }
.legend i { display: inline-block; width: 1.1em; height: .25em; margin-right: .4em; vertical-align: middle; }
.legend i.dashed { clip-path: polygon(0 0, 40% 0, 40% 100%, 60% 100%, 60% 0, 100% 0, 100% 100%, 0 100%); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; } .pictures img { max-width: 100%; border-radius: 4px; }
td { overflow-wrap: anywhere; } summary { cursor: pointer; margin-top: 2rem; font-weight: 600; }
""" + "".join(f"polyline.s{i} {{ stroke: var(--s{i}); }} circle.s{i} {{ fill: var(--s{i}); }} "
              f".legend i.s{i} {{ background: var(--s{i}); }}\n" for i in range(COLOURS))  # fmt: skip


def write_report(run: Path, baseline: Path | None = None) -> Path:
    """Write the page of a run directory into it.

    Args:
        run: what `dtokd train` wrote.
        baseline: a run of the same student without a teacher; default: the one that the run's options name.

    Returns:
        Its path.

    Raises:
        UsageError: it is no run directory, no epoch is finished, or a file of it is damaged.
    """
    from ..files import write_text
    from ..settings import settings_of
    from ..train.images import skipped

    settings = settings_of(run, "dtokd report")
    epochs = read_columns(run / "summary.csv", ("epoch", "lr"))
    steps = read_columns(run / "steps.csv", ("step",))
    if not epochs:
        raise UsageError(f"dtokd report: {run} has no finished epoch yet")
    environment = _read_environment(run / "environment.json")
    about = read_about(run)
    named = baseline or settings.get("baseline")
    base = None if named is None else read_baseline(Path(named), "dtokd report")
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f"<p>{_headline(settings, epochs)}</p>",
        *(f"<p>{escape(sentence)}</p>" for sentence in sentences(settings, epochs, about, base)),
        *(f"<p>{escape(line)}</p>" for line in _known(about)),
        f'<div class="grid-of">{"".join(_charts(epochs, steps, _beside(settings, epochs, about, base)))}</div>',
        classes_part(read_classes(run / "classes.json")),
        pictures(run / "pictures", "Validation images, best student"),
    ]
    if names := skipped(run / "bad_images.txt"):
        parts += [f"<h2>{len(names)} skipped images</h2>", table([("image",), *((name,) for name in names)])]
    # what concludes is above, what one looks up is folded
    options = [(k, _text(v)) for k, v in settings.items() if v not in (None, "", {})]
    parts += [
        _details("Epochs", _rows(epochs)),
        _details("Settings", [("option", "value"), *options]),
        _details("Environment", [("what", "value"), *((k, _text(v)) for k, v in environment.items())]),
    ]
    write_text(run / "report.html", document(run.name, parts))
    return run / "report.html"


def document(title: str, parts: Iterable[str]) -> str:
    """A page of this style."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def pictures(folder: Path, title: str, most: int | None = None) -> str:
    """Those that `dtokd detect` drew; the files are in the page."""
    files = sorted(folder.glob("*.jpg"))[:most]
    if not files:
        return ""
    data = {f.stem: base64.b64encode(f.read_bytes()).decode() for f in files}
    images = "".join(f'<img alt="image {name}" src="data:image/jpeg;base64,{d}">' for name, d in data.items())
    return (
        f"<h2>{escape(title)}</h2><p>Objects in green, detections above 0.3 in orange.</p>"
        f'<div class="pictures">{images}</div>'
    )


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        held = parse_json(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; remove it, and the report goes without") from error
    return held if isinstance(held, dict) else {}


def _listed(value: Any) -> str:
    """One name or several."""
    return ", ".join(value) if isinstance(value, list) else value or ""


def _headline(settings: Mapping[str, Any], epochs: Mapping[str, list[float]]) -> str:
    teacher, kind = (_listed(settings.get(key)) for key in ("kd_model_name", "kd_distill_type"))
    what = f"Student {settings['model']}" + (
        f", teacher {teacher} ({kind}), balance {settings['kd_balance']}" if teacher else ""
    )
    done = f"{len(epochs['epoch'])} finished epochs"
    prefix = "eval_ema_" if settings.get("model_ema") else "eval_"
    name = prefix + settings["eval_metric"]
    if name not in epochs:
        return escape(f"{what}. {done}.")
    best = best_of(epochs[name], is_lower_better(name))
    metric, value = name.removeprefix("eval_"), epochs[name][best]
    if math.isnan(value):
        return escape(f"{what}. {done}; {metric} is nan in all of them, so none is the best.")
    return escape(f"{what}. {done}; best {metric} {value:.4g} in epoch {epochs['epoch'][best] + 1:.0f}.")


def _known(about: Mapping[str, Any]) -> list[str]:
    """Data and models."""
    models = [part["told"] for part in (about.get("student"), *about.get("teachers", ())) if part]
    return [line for line in ("; ".join(about.get("data", ())), "; ".join(models)) if line]


def _beside(
    settings: Mapping[str, Any], epochs: Mapping[str, list[float]], about: Mapping[str, Any], base: Baseline | None
) -> dict[str, list[tuple[float, float]]]:
    """Lines to compare the student's metric with: the baseline's, and each teacher's, the same in all epochs."""
    metric = settings["eval_metric"]
    lines = {}
    if base is not None and base.prefix + metric in base.epochs:
        values = zip(base.epochs["epoch"], base.epochs[base.prefix + metric], strict=True)
        lines[f"baseline {base.name}: {metric}"] = [(epoch + 1, value) for epoch, value in values]
    ends = (epochs["epoch"][0] + 1, epochs["epoch"][-1] + 1)
    for teacher in about.get("teachers", ()):
        value = (teacher.get("metrics") or {}).get(metric)
        if isinstance(value, (int, float)):
            lines[f"teacher {teacher['name']}: {metric}"] = [(end, float(value)) for end in ends]
    return lines


def _charts(
    epochs: Mapping[str, list[float]],
    steps: Mapping[str, list[float]],
    beside: Mapping[str, list[tuple[float, float]]],
) -> Iterable[str]:
    numbers = [value + 1 for value in epochs["epoch"]]

    def over_epochs(pattern: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name.removeprefix(pattern): list(zip(numbers, values, strict=True))
            for name, values in epochs.items()
            if name.startswith(pattern)
        }

    def over_steps(pattern: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name.removeprefix(pattern): list(zip(steps["step"], values, strict=True))
            for name, values in steps.items()
            if name.startswith(pattern)
        }

    accuracy = {name: points for name, points in over_epochs("eval_").items() if "top" in name}
    compared = {name: points for name, points in beside.items() if ": top" in name}
    yield line_chart("Accuracy, validation, percent", accuracy | compared, "epoch")
    precision = {n: p for n, p in over_epochs("eval_").items() if n.removeprefix("ema_").startswith("ap")}
    compared = {name: points for name, points in beside.items() if ": ap" in name}
    yield line_chart("COCO's average precision, validation", precision | compared, "epoch")
    yield line_chart("Errors: points of AP50 each kind costs (paper: Fig. 4)", over_epochs("eval_error_"), "epoch")
    losses = {f"training: {name}": points for name, points in over_epochs("train_").items()}
    losses |= {f"validation: {name}": p for name, p in over_epochs("eval_").items() if name.endswith("loss")}
    losses |= {name: points for name, points in beside.items() if name.endswith(": loss")}
    yield line_chart("Losses", losses, "epoch")
    yield line_chart("Weights, mean over the epoch (paper: Fig. 3)", over_epochs("weight_"), "epoch")
    if steps:
        yield line_chart("Conflict: cosine of the gradients (Fig. 1)", over_steps("cosine_"), "iteration", mark=0)
        norms = over_steps("norm_")
        if "dominance" in steps:
            label = "{1} / {0}".format(*norms)
            ratio = {label: list(zip(steps["step"], steps["dominance"], strict=True))}
            title = "Dominance: ratio of the gradients' norms (Fig. 1)"
            yield line_chart(title, ratio, "iteration", log=True, mark=1)
        yield line_chart("Norms of the gradients", norms, "iteration", log=True)
    rates = {name: list(zip(numbers, epochs[name], strict=True)) for name in epochs if name.endswith("_rate")}
    yield line_chart("Share of iterations: in conflict, at a vertex, skipped", rates, "epoch")
    yield line_chart("Learning rate", {"lr": list(zip(numbers, epochs["lr"], strict=True))}, "epoch")


def _rows(columns: Mapping[str, list[float]]) -> list[tuple[str, ...]]:
    values = zip(*columns.values(), strict=True)
    return [tuple(columns), *(tuple(f"{value:.5g}" for value in row) for row in values)]


def _details(title: str, rows: list[tuple[str, ...]]) -> str:
    return fold(title, table(rows))


def fold(title: str, inner: str) -> str:
    """A part of a page that a reader may open."""
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """The first row is the head."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
