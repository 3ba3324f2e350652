"""Whether a model's licence may stand beside those of its base and data: a small table of rules, no legal advice.

The rules say what the licences' own texts ask of somebody who passes on a derivative. Whether a model is a derivative
of its training data is not settled in law, so data whose terms would then bind it are "unknown" and never pass.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .facts import Compatibility, CompatibilityVerdict

NOT_LEGAL_ADVICE = (
    "Read from the licences' names by a small table of rules, not from their texts or anybody's contracts: "
    "this is not legal advice."
)


@dataclass(frozen=True)
class Terms:
    """What a licence asks of derivatives. `family` is equal for licences under which they may be passed on."""

    family: str
    share_alike: bool = False
    non_commercial: bool = False
    no_derivatives: bool = False
    is_custom: bool = False


_PERMISSIVE = {
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib", "ncsa"),
    *("unlicense", "wtfpl", "cc0-1.0", "pddl", "odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0", "afl-3.0"),
    *("ecl-2.0", "postgresql", "bsl-1.0", "artistic-2.0", "psf-2.0", "python-2.0"),
}
_SHARE_ALIKE = {
    *("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "osl-3.0"),
    *("epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "odbl", "cdla-sharing-1.0", "gfdl"),
}
# What a share-alike licence lets changed versions come under beside itself.
_MAY_BECOME = {
    "gpl-3.0": {"agpl-3.0"},
    "lgpl-2.1": {"gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0"},
    "lgpl-3.0": {"gpl-3.0", "agpl-3.0"},
    "mpl-2.0": {"gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0"},
    "cc-by-sa": {"gpl-3.0"},
}
# Licences made for models: derivatives stay under them, or carry their limits on use.
_CUSTOM = re.compile(
    r"(llama-?\d|gemma|deepseek|tongyi-qianwen|qwen|openrail|bigscience-|creativeml-|bigcode-|bigscience|falcon|"
    r"mistral-ai|mrl|mnpl|grok|nvidia-open-model|apple-am|health-ai|h-research)"
)
_OPENRAIL = re.compile("openrail|bloom-rail")
_NON_COMMERCIAL = re.compile("-nc|non-?commercial|research|mnpl|mrl")
_CREATIVE_COMMONS = re.compile(r"cc-by((?:-(?:nc|sa|nd))*)(-\d\.\d)?")


def find_terms(license: str | None) -> Terms | None:
    """What the table knows of a licence by its Hub id or name; None where it knows nothing."""
    if license is None:
        return None
    word = re.sub(r"[\s_]+", "-", license.strip().lower())
    if word in _PERMISSIVE:
        return Terms("permissive")
    if word in _SHARE_ALIKE:
        return Terms(word, share_alike=True)
    match = _CREATIVE_COMMONS.fullmatch(word)
    if match:
        flags = match.group(1).split("-")
        family = f"cc-by{match.group(1)}" if "sa" in flags else "permissive"
        return Terms(family, share_alike="sa" in flags, non_commercial="nc" in flags, no_derivatives="nd" in flags)
    if _OPENRAIL.search(word) or _CUSTOM.match(word):
        return Terms(word, is_custom=True, non_commercial=bool(_NON_COMMERCIAL.search(word)))
    return None


def check_licence(model: str | None, source: str, source_license: str | None, *, is_dataset: bool) -> Compatibility:
    """Whether `model` (a licence) may be given to something made from `source`; unknown is never compatible."""
    verdict, reason = _judge(model, source_license, is_dataset=is_dataset)
    return Compatibility(source, source_license, verdict, reason)


def summarise(checks: Iterable[Compatibility]) -> CompatibilityVerdict:
    """One conflict is a conflict; one unknown, or nothing to check, is unknown."""
    verdicts = {check.verdict for check in checks}
    if "conflict" in verdicts:
        return "conflict"
    return "compatible" if verdicts == {"compatible"} else "unknown"


def _judge(model: str | None, source: str | None, *, is_dataset: bool) -> tuple[CompatibilityVerdict, str]:
    ours, theirs = find_terms(model), find_terms(source)
    if model is None:
        return "unknown", "the model declares no licence"
    if source is None:
        return "unknown", "its licence is not known"
    if theirs is None:
        return "unknown", "its licence is not in the table; read its text"
    if ours is None:
        return "unknown", "the model's licence is not in the table; read its text"
    if theirs.non_commercial and not ours.non_commercial:
        return "conflict", "it forbids commercial use, and the model's licence permits it"
    if is_dataset:
        return _judge_data(ours, theirs)
    if theirs.no_derivatives:
        return "conflict", "it forbids passing on changed versions"
    if (theirs.share_alike or theirs.is_custom) and ours.family not in {
        theirs.family,
        *_MAY_BECOME.get(theirs.family, ()),
    }:
        return _judge_mismatch(ours, theirs)
    if theirs.share_alike or theirs.is_custom:
        return "compatible", "it permits changed versions under this licence"
    return "compatible", "its terms leave the choice of licence; its notices have to be kept"


def _judge_mismatch(ours: Terms, theirs: Terms) -> tuple[CompatibilityVerdict, str]:
    if _name_alone(ours.family) == _name_alone(theirs.family):
        return "unknown", "the versions of the licence differ; read whether it permits the other one"
    if theirs.is_custom:
        return "conflict", "it is a licence of its own, whose terms changed versions have to carry on"
    return "conflict", "it asks that changed versions stay under the same licence"


def _name_alone(family: str) -> str:
    return re.split(r"[-\d]", family, maxsplit=1)[0]


def _judge_data(ours: Terms, theirs: Terms) -> tuple[CompatibilityVerdict, str]:
    if theirs.family == ours.family and not theirs.no_derivatives:
        return "compatible", "both are of the same terms"
    if theirs.no_derivatives:
        return "unknown", "it forbids changed versions; whether a model is one of its training data is not settled"
    if theirs.share_alike:
        return "unknown", "it asks for the same licence; whether a model is derived from its data is not settled"
    if theirs.is_custom:
        return "unknown", "it is a licence of its own; read what it says about training"
    return "compatible", "its terms leave the choice of licence; its notices have to be kept"
