"""The command `internimage`: help, errors and exit codes, as a user meets them."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import exits
from launch.cli import app, run, without_local_rank

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", exits.DEBUG_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


def internimage(*arguments: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def commands() -> list[list[str]]:
    """Every command's words, groups' members included."""
    import typer

    root = typer.main.get_command(app)
    found = []
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        members = getattr(command, "commands", None)
        found += [[name, member] for member in members] if members else [[name]]
    return found


def test_help_needs_no_heavy_library_and_little_time() -> None:
    code = (
        "import sys; from launch.cli import run; run(['--help']); run(['pretrain', '--help']); "
        "heavy = {'torch', 'numpy', 'deepspeed', 'pyarrow'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    assert min(_processor_seconds(["--help"]) for _ in range(3)) < 0.5


def _processor_seconds(arguments: list[str]) -> float:
    """Of one command in a process of its own: what it takes where nothing else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "launch", *arguments], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_says_what_it_is_for_and_shows_an_example(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"Example: internimage {' '.join(words)}\b", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[1].endswith((".", ";")) and len(lines[1]) < 160


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "nothing_of_this_name"], "no configuration 'nothing_of_this_name'"),
        (["pretrain"], "Missing argument"),
        (["pretrian"], "No such command"),
        (["pretrain", "internimage_t_in1k", "optimizer.lrr=1"], "Did you mean 'optimizer.lr'?"),
        (["pretrain", "internimage_t_in1k", "training.batch_size=0"], "training.batch_size"),
        (["pretrain", "internimage_t_in1k", "--processes", "some"], "expected `auto` or a number"),
        (["pretrain", "internimage_t_in1k", "--profile", "10"], "training.profile"),
        (["pretrain", "internimage_t_in1k", "data.sources.0.path=/nowhere"], "'/nowhere' does not exist"),
        (["finetune", "finetune_in1k", "--from", "/nowhere"], "--from /nowhere: does not exist"),
        (["launch", "local", "--first-rank", "3", "--world-size", "2", "true"], "more than --world-size 2"),
        (["launch", "slurm", "--gpus-per-node", "many", "--dry-run", "true"], "as h100:8"),
        (["launch", "slurm", "--time", "5", "--dry-run", "true"], "--time 5 is no longer than the 300 s"),
        (["export", "runs/x", "out", "--to", "docx"], "--to"),
    ],
)
def test_a_users_mistake_ends_with_2_and_no_traceback(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert words in re.sub(r"\s*│\s*", " ", error)
    assert "Traceback" not in error


def test_mistakes_are_told_without_torch_and_before_any_rank(tiny_run: Callable[..., Path]) -> None:
    config = tiny_run()
    code = (
        "import os, sys; from launch.cli import run; os.chdir(sys.argv[1]); "
        "code = run(['pretrain', sys.argv[2], '--processes', '3']); sys.exit(99 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, str(config.parent), str(config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "training.batch_size 8 is not divisible by 3 processes" in done.stderr
    assert "take 6 or 9" in done.stderr
    assert not (config.parent / "runs").exists()


def test_a_folder_without_shards_is_told_from_a_missing_one(
    tiny_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["pretrain", str(tiny_run()), f"data.sources.0.path={tmp_path / 'empty'}"]) == 2
    assert "holds neither manifest.json nor a .tar file" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(
    tiny_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(["pretrain", str(tiny_run()), "--output", str(tmp_path / "file")]) == 2
    assert "exists and is not a folder" in capsys.readouterr().err


def test_print_config_shows_the_resolved_whole(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert run(["pretrain", "internimage_h_m3i_427m", "--print-config", "optimizer.lr=3e-4"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optimizer"]["lr"] == 3e-4
    assert shown["checkpoint"]["asynchronous"] is True  # a default


@pytest.mark.parametrize("words", [["--profile", "steps=10:13"], ["--profile", "10:13"], ["training.profile=10:13"]])
def test_a_window_of_steps_to_trace_may_be_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert run(["pretrain", "demo", "--print-config", *words]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["training"]["profile"] == "10:13"


class Refusal(Exception):
    pass


def test_exit_codes_of_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.errors import BadDataError, GaveUpError, StoppedError, UserError

    def fail(error: BaseException) -> Callable[[], None]:
        def raising() -> None:
            raise error

        return raising

    for error, code in (
        (UserError("a"), 2),
        (BadDataError("a"), 3),
        (GaveUpError("a"), 4),
        (StoppedError("a"), 75),
        (KeyboardInterrupt(), 130),
        (Refusal("first line\nsecond line"), 1),
        (SystemExit(7), 7),
    ):
        assert exits.guarded(fail(error)) == code
    text = capsys.readouterr().err
    assert "Refusal: first line\n" in text and "second line" not in text and "--debug" in text
    assert "Traceback" not in text
    monkeypatch.setenv(exits.DEBUG_VARIABLE, "1")
    exits.guarded(fail(Refusal("x")))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback_wherever_it_stands(place: str) -> None:
    words = ["pretrain", "nothing_of_this_name"]
    done = internimage(*(["--debug", *words] if place == "before" else [*words, "--debug"]))
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_reader_that_leaves_is_no_error_message() -> None:
    done = subprocess.run(
        f"{sys.executable} -m launch pretrain internimage_h_m3i_427m --print-config | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("model:")
    assert done.stderr == ""


def test_launch_local_passes_the_commands_own_options_and_code(tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[2] + os.environ['RANK'], 'w').write(sys.argv[1]); sys.exit(4)"
    done = internimage(
        "launch", "local", "--processes", "2", sys.executable, "-c", code, "--debug", str(tmp_path / "rank-")
    )
    assert done.returncode == 4
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["--debug", "--debug"]


@pytest.mark.slow
def test_two_ranks_pretrain_stop_on_request_resume_and_are_exported(tiny_run: Callable[..., Path]) -> None:
    config = tiny_run("training.stop_after=6")
    folder = config.parent
    stopped = internimage("pretrain", str(config), "--output", "run", "--processes", "2", folder=folder)
    assert stopped.returncode == 75, stopped.stderr
    again = ("pretrain", str(config), "--output", "run", "--processes", "1", "training.stop_after=null")
    assert internimage(*again, folder=folder).returncode == 0
    kinds = [json.loads(line)["kind"] for line in (folder / "run/events.jsonl").read_text().splitlines()]
    assert [k for k in kinds if k in ("start", "stopped", "resume", "done")] == ["start", "stopped", "resume", "done"]
    assert (folder / "run/logs/rank-00001.log").exists()
    exported = internimage("export", "run", "weights.safetensors", "--to", "safetensors", folder=folder)
    assert exported.returncode == 0, exported.stderr
    described = internimage("inspect", "checkpoint", "run", "--json", folder=folder)
    assert json.loads(described.stdout)["step"] == 12


@pytest.mark.parametrize("words", [["--local_rank=3"], ["--local_rank", "3"], ["--local-rank=3"]])
def test_a_rank_takes_the_local_rank_that_deepspeed_puts_before_its_command(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "11")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert without_local_rank([*words, "pretrain", "x"]) == ["pretrain", "x"]
    assert os.environ["LOCAL_RANK"] == "3"
    assert without_local_rank(["pretrain", "x", *words]) == ["pretrain", "x"]
    monkeypatch.delenv("RANK")
    assert without_local_rank([*words, "pretrain"]) == [*words, "pretrain"], "a person's mistake stays one"
