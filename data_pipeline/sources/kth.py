"""KTH actions (Schuldt, Laptev & Caputo 2004). Torch-free.

    path/boxing/person01_boxing_d1_uncomp.avi   in six class folders, or in any others
    path/00sequences.txt                        person01_boxing_d1   frames   1-95, 96-185, 186-245, 246-360

Persons 1 to 16 are for training and 17 to 25 for validation, as in the papers on video prediction since Villegas et al.
2017 (arXiv:1706.08033). Where 00sequences.txt is there, KEY.json has ``sequences``: the frame ranges in which the
person is to be seen, from 0, end excluded. The files published lack one of the 600, person13_handclapping_d3.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.config import KthSource
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Description
from data_pipeline.sources.source import SourceSample, make_key, media_files

log = logging.getLogger(__name__)

_ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
_SCENARIOS = ("outdoors", "outdoors with scale variation", "outdoors with different clothes", "indoors")
_NAME = re.compile(rf"person(\d\d)_({'|'.join(_ACTIONS)})_d([1-4])")
_LINE = re.compile(rf"^\s*({_NAME.pattern})\s+frames\s+([\d\s,-]+)$", re.MULTILINE)
_LAST_TRAINING_PERSON = 16


def walk(config: KthSource) -> list[SourceSample]:
    """The videos in the order of their names. UsageError if there are none."""
    root = config.path
    videos = {path: _NAME.fullmatch(path.stem.removesuffix("_uncomp")) for path in media_files(root, ("avi",))}
    if strange := [path for path, match in videos.items() if not match]:
        log.warning("%s: %d videos are not named as KTH's and are left out, such as %s", root, len(strange), strange[0])
    if len(strange) == len(videos):
        raise UsageError(
            f"{root}: no personNN_ACTION_dM_uncomp.avi in any sub-folder; unpack the six archives of "
            "https://www.csc.kth.se/cvap/actions/ there, or correct source.path"
        )
    sequences = _sequences(root / "00sequences.txt")
    samples = []
    for path, match in videos.items():
        if match:
            person, action, scenario = int(match[1]), match[2], int(match[3])
            about = {"person": person, "scenario": _SCENARIOS[scenario - 1]}
            if match[0] in sequences:
                about["sequences"] = sequences[match[0]]
            split, name = "train" if person <= _LAST_TRAINING_PERSON else "val", path.relative_to(root).as_posix()
            samples.append(SourceSample(make_key(name), split, action, name, about, path))
    return samples


def describe(config: KthSource, samples: Sequence[SourceSample]) -> Description:
    """With all six classes, so that their numbers do not depend on which videos are there."""
    return Description(kind="clips", classes=list(_ACTIONS))


def _sequences(file: Path) -> dict[str, list[list[int]]]:
    """Video → frame ranges, from 0, end excluded; the file counts from 1 and includes the last."""
    if not file.is_file():
        log.info("%s: not there; the shards will not say in which frames the person is to be seen", file)
        return {}
    return {
        line[1]: [[int(first) - 1, int(last)] for first, last in re.findall(r"(\d+)\s*-\s*(\d+)", line[5])]
        for line in _LINE.finditer(file.read_text())
    }
