"""The report in a real browser, where there is one: it opens without an error or a request."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pretrain.report import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1200,1600",
]


def console(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    assert BROWSER
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_report_opens_without_console_messages(run_dir, tmp_path):
    report = write_report(run_dir)
    document, messages = console(report, tmp_path / "profile", "--dump-dom", f"--screenshot={tmp_path / 'page.png'}")
    assert messages == ""
    assert '<section id="scores">' in document

    # The same watch does see a page that breaks the promise.
    broken = run_dir / "broken.html"
    broken.write_text(report.read_text().replace("</main>", '<img src="absent.png"><script>fail()</script></main>'))
    _, messages = console(broken, tmp_path / "profile2", "--dump-dom")
    assert "Content Security Policy" in messages
