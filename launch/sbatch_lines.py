"""What the scripts for sbatch share: how a line of #SBATCH is written, and what sbatch and srun want said."""

from collections.abc import Iterable, Sequence

CPUS_PER_TASK = 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun no longer takes it from sbatch'


def options(named: Iterable[tuple[str, object]]) -> list[str]:
    """Writes options by name, those that are None apart."""
    return [f"--{name}={_escaped(str(value))}" for name, value in named if value is not None]


def log_file(folder: str, name: str) -> str:
    """Returns the path of a log whose name has sbatch's patterns (%j), and whose folder has none, whatever it is."""
    return f"{folder.replace('%', '%%')}/{name}"


def after(jobs: Sequence[str]) -> str | None:
    """Returns the dependency on jobs that must have ended well."""
    return f"afterok:{':'.join(jobs)}" if jobs else None


def _escaped(value: str) -> str:
    """As sbatch reads the words of a #SBATCH line: in double quotes, where a backslash makes a character ordinary. It
    expands nothing there.
    """
    if all(character.isalnum() or character in "_-./=:,%@+[]" for character in value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
