"""Ray jobs: the command lines of this package sent to a cluster, followed, listed and stopped."""

import asyncio
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.table import Table

from bdkd_dist.errors import UserError, first_line, nearest
from bdkd_dist.launch.source_package import source_files, write_archive
from bdkd_dist.uris import shown

ENTRYPOINT = "python -m bdkd_dist"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where Ray's own ``ray job`` looks for an address."""
ANSWER_WITHIN_S = 10.0
STOP_WAIT_S = 120
"""Between the wish to stop and SIGKILL: a step ends and a checkpoint is written. Ray's own default is 3 s."""
POLL_S = 0.5
RECONNECTS = 10
"""So often in a row a broken connection to a job's log is made again before that is given up."""
STOPPED = 130


class Jobs:
    """The jobs of one cluster, by the HTTP address of its head node's job server."""

    def __init__(self, address: str | None):
        """Connect.

        Args:
            address: ``http://HEAD:8265``; None is what the environment says, as with ``ray job``.

        Raises:
            UserError: No address, nobody there, or not with this token.
        """
        self.address, self.option = _address(address), "" if address is None else f" --address {address}"
        _use_token()
        import requests  # as Ray's client does, by the same proxies and certificates
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        with self._asking():
            requests.get(f"{self.address}/api/version", timeout=ANSWER_WITHIN_S)  # Ray's client would wait for ever
            os.environ[ADDRESS_VARIABLES[0]] = self.address  # to Ray's client the environment counts more than this:
            self.client = JobSubmissionClient(self.address)

    def submit(self, arguments: Sequence[str], folder: Path) -> str:
        """Send a command line that was checked, with the source tree of a folder, and return the job's id."""
        with tempfile.TemporaryDirectory() as scratch, self._asking():
            archive = Path(scratch, "source.zip")
            write_archive(source_files(folder), archive)
            return self.client.submit_job(
                entrypoint=f"{ENTRYPOINT} {shlex.join(arguments)}",
                runtime_env={
                    "working_dir": str(archive),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},  # read by the job's supervisor
                },
            )

    def follow(self, job: str, write: Callable[[str], object], say: Callable[[str], object]) -> int:
        """Write a job's log until the job ends, and return its exit status: that of the command, 1 where Ray failed.

        Args:
            job: Its id.
            write: Takes pieces of the log.
            say: Takes lines about the job.

        Raises:
            UserError: Unknown, or the cluster does not answer any more.
        """
        try:
            asyncio.run(self._stream(job, write))
        except KeyboardInterrupt:
            say(f"the job goes on; {self.hint(job)}")
            return STOPPED
        details = self._details(job)
        match str(details.status):
            case "SUCCEEDED":
                return 0
            case "STOPPED":
                say(f"job {job} was stopped")
                return STOPPED
        if details.driver_exit_code is None:
            say(f"job {job} failed in Ray: {first_line(RuntimeError(details.message))}")
            return 1
        code = int(details.driver_exit_code)
        return 128 - code if code < 0 else code  # negative: ended by a signal, as a shell would say it

    def log(self, job: str) -> str:
        """Return what a job has written up to now."""
        self._details(job)
        with self._asking():
            return self.client.get_job_logs(job)

    def stop(self, job: str) -> str:
        """Stop a job, wait until it has ended, and return how it ended."""
        ended = self._details(job)
        if ended.status.is_terminal():
            return f"job {job} had already ended: {_status(ended)}"
        with self._asking():
            self.client.stop_job(job)
        while not (details := self._details(job)).status.is_terminal():
            time.sleep(POLL_S)
        return f"job {job}: {_status(details)}"

    def table(self) -> Table:
        """Return all jobs that were submitted, the newest last."""
        shown = Table(title=f"jobs on {self.address}", title_justify="left")
        for heading in ("id", "status", "started", "duration", "command"):
            shown.add_column(heading, overflow="fold")
        for job in self._all():
            start_s = job.start_time / 1000
            end_s = job.end_time / 1000 if job.end_time else time.time()
            shown.add_row(
                job.submission_id,
                _status(job),
                f"{datetime.fromtimestamp(start_s):%Y-%m-%d %H:%M:%S}",
                str(timedelta(seconds=max(0, round(end_s - start_s)))),
                job.entrypoint.replace(ENTRYPOINT, "bdkd", 1),
            )
        return shown

    def hint(self, job: str) -> str:
        """Return how to come back to a job."""
        return f"follow it: bdkd jobs logs {job} --follow{self.option}; stop it: bdkd jobs stop {job}{self.option}"

    async def _stream(self, job: str, write: Callable[[str], object]) -> None:
        import aiohttp

        written = failed = 0
        while True:
            read = 0
            try:
                async for text in self.client.tail_job_logs(job):
                    write(text[max(0, written - read) :])  # a new connection begins at the log's beginning
                    read += len(text)
                    written, failed = max(written, read), 0
            except (aiohttp.ClientError, RuntimeError):  # the connection; the job's state says whether that matters
                failed += 1
            try:
                if self._details(job).status.is_terminal():
                    return
            except UserError as error:
                if failed > RECONNECTS:
                    raise UserError(f"{error}; the job may go on, {self.hint(job)}") from None
                failed += 1
            await asyncio.sleep(POLL_S)

    def _details(self, job: str) -> Any:
        for details in (jobs := self._all()):
            if details.submission_id == job:
                return details
        raise UserError(
            f"unknown job '{job}'{nearest(job, [known.submission_id for known in jobs])} "
            f"(`bdkd jobs list{self.option}` shows all)"
        )

    def _all(self) -> list[Any]:
        with self._asking():
            jobs = [job for job in self.client.list_jobs() if job.submission_id is not None]
        return sorted(jobs, key=lambda job: job.start_time)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Say in one line what keeps the cluster from answering."""
        import requests
        from ray.exceptions import AuthenticationError

        at = f"--address {shown(self.address)}"
        try:
            yield
        except AuthenticationError as error:
            missing = "Missing" in str(error)
            raise UserError(
                f"{at}: the cluster wants {'a' if missing else 'another'} token; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the cluster's"
            ) from None
        except (requests.exceptions.JSONDecodeError, requests.exceptions.HTTPError, KeyError):
            raise UserError(f"{at}: what answers there is no Ray dashboard") from None
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise UserError(
                f"{at}: nobody answers ({_reason(error)}); give http://HEAD:8265, the dashboard of a running cluster"
            ) from None
        except RuntimeError as error:
            raise UserError(f"{at}: {first_line(error)}") from None


def _address(address: str | None) -> str:
    if address is None:
        of_environment = (os.environ.get(variable, "") for variable in ADDRESS_VARIABLES)
        address = next((value for value in of_environment if value.startswith(("http://", "https://"))), None)
    if address is None:
        raise UserError(f"give --address http://HEAD:8265, or set {ADDRESS_VARIABLES[0]} to it")
    address = address.rstrip("/")
    if "://" not in address:
        return f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {shown(address)}: the job server speaks HTTP; give http://HEAD:8265")
    return address


def _use_token() -> None:
    """Show the token that this machine holds, as ``ray start`` and ``ray.init`` do; before Ray reads its settings."""
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if given or Path("~/.ray/auth_token").expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _status(job: Any) -> str:
    code = job.driver_exit_code
    return f"{job.status} ({code})" if code else str(job.status)


def _reason(error: BaseException) -> str:
    """Return the innermost cause of requests' long story."""
    found = re.findall(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
    return found[-1] if found else type(error).__name__
