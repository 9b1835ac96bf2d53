"""Print the newest Python that is newer than the one running this script.

Only versions named in pyproject.toml's classifiers count. Prints nothing if there is
none. A command on PATH may be a version manager's stub that fails, so each candidate
must run and be able to make a virtual environment.
"""

import os
import pathlib
import subprocess
import sys
import tomllib

PYPROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"
PROBE = "import ensurepip, sys; print(*sys.version_info[:2], sep='.')"


def newer_versions() -> list[str]:
    """Versions in the classifiers above this one's, the newest first."""
    classifiers = tomllib.loads(PYPROJECT.read_text())["project"]["classifiers"]
    named = [c.rpartition(" ")[2] for c in classifiers if " :: Python :: 3." in c]
    minors = sorted((int(version.split(".")[1]) for version in named), reverse=True)
    return [f"3.{minor}" for minor in minors if minor > sys.version_info.minor]


def folders() -> list[pathlib.Path]:
    """PATH, then installations in the same folder as this Python's."""
    on_path = [pathlib.Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    return on_path + sorted(pathlib.Path(sys.base_prefix).parent.glob("*/bin"))


def runs(command: pathlib.Path, version: str) -> bool:
    """Whether `command` is a Python of this version that has ensurepip."""
    if not command.is_file():
        return False
    try:
        result = subprocess.run(
            [command, "-c", PROBE], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0 and result.stdout.strip() == version


def main() -> None:
    for version in newer_versions():
        for folder in folders():
            command = folder / f"python{version}"
            if runs(command, version):
                print(command)
                return


if __name__ == "__main__":
    main()
