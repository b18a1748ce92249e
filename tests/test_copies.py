"""What all scripts have in common: identical copies of blocks, no imports of ours, help at once.

    python tests/test_copies.py                 list the blocks and where they stand
    python tests/test_copies.py --write FILE    spread FILE's version of its blocks to all other scripts
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data_prep", "pretrain", "finetune", "evaluate")
BLOCK = re.compile(r"# --- begin copy: (?P<name>[^\n]+?) ---\n"
                   r"(?P<body>.*?)# --- end copy: (?P=name) ---\n", re.S)


def blocks(path):
    """{name: text between the markers} of one script."""
    return {match["name"]: match["body"] for match in BLOCK.finditer(path.read_text())}


def scripts():
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def test_copies_are_identical():
    first = {}
    drifted = []
    for path in scripts():
        for name, body in blocks(path).items():
            owner, text = first.setdefault(name, (path, body))
            if text != body:
                places = f"{owner.relative_to(ROOT)} and {path.relative_to(ROOT)}"
                drifted.append(f"'{name}' differs between {places}")
    assert not drifted, "; ".join(drifted) + " (python tests/test_copies.py --write FILE spreads one version)"


def test_every_marker_has_its_pair():
    for path in scripts():
        text = path.read_text()
        begun = re.findall(r"^# --- begin copy: (.+) ---$", text, re.M)
        ended = re.findall(r"^# --- end copy: (.+) ---$", text, re.M)
        assert begun == ended == list(blocks(path)), f"{path}: markers {begun} against {ended}"
        assert len(set(begun)) == len(begun), f"{path}: a block stands twice"


def test_scripts_import_nothing_of_ours():
    ours = {path.stem for path in scripts()} | set(FOLDERS) | {"tests"}
    for path in scripts():
        imported = set(re.findall(r"^\s*(?:import|from)\s+(\w+)", path.read_text(), re.M))
        assert not imported & ours, f"{path} imports {imported & ours}"


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_help_comes_without_the_seconds_that_large_imports_take(path):
    command = [sys.executable, "-X", "importtime", path, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert result.returncode == 0 and "argparse" in imported
    assert not imported & {"torch", "timm", "sklearn", "matplotlib", "scipy.optimize"}
    first = path.read_text().split('"""', 2)[1].splitlines()[0]
    assert first in result.stdout


def write(source):
    """Spread the blocks of one script to every other script that holds a block of the same name."""
    wanted = blocks(Path(source))

    def spread(block):
        body = block["body"]
        return block[0].replace(body, wanted.get(block["name"], body)) if body else block[0]

    for path in scripts():
        text = path.read_text()
        new = BLOCK.sub(spread, text)
        if new != text:
            path.write_text(new)
            print(f"updated {path.relative_to(ROOT)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"] and len(sys.argv) == 3:
        write(sys.argv[2])
    else:
        for path in scripts():
            print(f"{path.relative_to(ROOT)}: {', '.join(blocks(path)) or '-'}")
