"""Is there in the wheel and in the sdist what should be, and nothing else? `contents.py WHEEL SDIST`."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

NOT_IN_THE_SDIST = (".ci/", ".gitignore")


def main(wheel: Path, sdist: Path) -> None:
    tracked = set(subprocess.check_output(["git", "ls-files"], text=True).splitlines())
    modules = {each for each in tracked if each.startswith("asynccache/")}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not re.match(r"[^/]+\.dist-info/", name)}
    compare("the wheel", found, modules)
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    # hatchling puts the metadata in, and .gitignore, which it has read.
    expected = {each for each in tracked if not each.startswith(NOT_IN_THE_SDIST)}
    compare("the sdist", found - {"PKG-INFO", ".gitignore"}, expected)


def compare(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        sys.exit(f"{what} lacks {sorted(expected - found)} and should not have {sorted(found - expected)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
