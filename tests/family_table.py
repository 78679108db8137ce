"""The README's table of families and methods, made from what a run of the tests proved.

VLMEFF_COVERAGE_TABLE=cells.json python -m pytest
python tests/family_table.py cells.json            # write the table into README.md
python tests/family_table.py cells.json --check    # fail when README.md says anything else
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- family table: python tests/family_table.py -->", "<!-- end of family table -->"
FAMILIES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma",
    "perception_lm": "PerceptionLM",
}
METHODS = {
    "hiprune": "HiPrune",
    "hiprune++": "HiPrune++",
    "divprune": "DivPrune",
    "scope": "SCOPE",
    "visionzip": "VisionZip",
    "fourier": "Fourier",
    "adaptinfer": "AdaptInfer",
}
MARKS = {(True, True): "pictures, video", (True, False): "pictures", (False, True): "video", (False, False): "-"}


def table(cells: list[dict[str, object]]) -> str:
    """A Markdown table; a cell says what the tests proved, "-" where they proved nothing."""
    proved = {(cell["family"], cell["method"], cell["modality"]) for cell in cells}
    lines = [
        "| model | " + " | ".join(METHODS.values()) + " |",
        "|---" * (len(METHODS) + 1) + "|",
    ]
    for family, title in FAMILIES.items():
        marks = [MARKS[(family, m, "image") in proved, (family, m, "video") in proved] for m in METHODS]
        lines.append(f"| {title} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="what the tests wrote to VLMEFF_COVERAGE_TABLE")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when README.md differs")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        print(f"README.md has no {START} ... {END}", file=sys.stderr)
        return 2
    made = f"{before}{START}\n{table(json.loads(args.cells.read_text())['cells'])}\n{END}{after}"
    if args.check:
        if made != text:
            print("README.md: the table of families is not what the tests proved; run tests/family_table.py")
            return 1
        return 0
    README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
