"""Sources by name."""

from __future__ import annotations

from collections.abc import Callable

from ..types import Options
from .feature import Feature
from .lag import Lag
from .overlap import Overlap
from .probe import Probe
from .source import Exact, Source
from .unmeasured import Unmeasured

_SOURCES: dict[str, Callable[[], Source]] = {
    "exact": Exact,
    "overlap": Overlap,
    "lag": Lag,
    "probe": Probe,
    "feature": Feature,
    "none": Unmeasured,
}

#: What `gram=` may be, besides an object.
NAMES = tuple(_SOURCES)


def choose(op: str, source: Source | str | None, options: Options) -> Source:
    """The source for a weighting; by default exact, or none if the weighting needs no Gram matrix.

    Raises:
        TypeError, ValueError: as `source_of`; 'none' for a weighting that needs the Gram matrix.
    """
    if source is None:
        return Exact() if options.needs_gram else Unmeasured()
    found = source_of(f"{op}: gram", source)
    if options.needs_gram and isinstance(found, Unmeasured):
        raise ValueError(
            f"{op}: gram is 'none', but weighting {options.weighting!r} needs the Gram matrix; choose another, such as "
            "'exact'"
        )
    return found


def source_of(argument: str, source: Source | str) -> Source:
    """The source that a name or an object stands for.

    Args:
        argument: what error messages call it.
        source: the user's choice.

    Raises:
        TypeError: neither a name nor a source.
        ValueError: no source has this name.
    """
    if isinstance(source, Source):
        return source
    if not isinstance(source, str):
        raise TypeError(
            f"{argument} is {source!r}; pass one of {', '.join(map(repr, NAMES))}, or an object of "
            "dtokd_kernels.sources such as Every(10)"
        )
    if source not in _SOURCES:
        raise ValueError(
            f"{argument} is {source!r}; choose one of {', '.join(map(repr, NAMES))}, or pass an object of "
            "dtokd_kernels.sources such as Every(10)"
        )
    return _SOURCES[source]()


def measuring(op: str, source: Source | str) -> Source:
    """A source that measures: what `Every` and `Ema` need.

    Raises:
        TypeError, ValueError: as `source_of`; it is 'none'.
    """
    found = source_of(f"{op}: source", source)
    if isinstance(found, Unmeasured):
        raise ValueError(f"{op}: source is 'none', which measures no Gram matrix; choose another, such as 'exact'")
    return found
