"""`shoal doctor`: what this machine can do, what is misconfigured, and how to mend it.

Things are tried rather than derived from version numbers. Nothing is changed: what is mounted for a trial is mounted in namespaces
that end with the doctor (`agent.observe.trial`), ports are bound and not listened on, files have no names. Checks run at the same
time, each under the same deadline; one that does not end by then is itself a finding.
"""

import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from agent.admin.client import call
from agent.config import Settings
from agent.errors import LinkError, ShoalError
from agent.observe import machine
from agent.observe.findings import Finding, error, note, warning
from agent.observe.slim_imports import without_decoration
from agent.observe.trial import Trial, open_trial
from fsmount import __version__ as fsmount_version
from fsmount.link import FsmountInfo, open_link

__all__ = ["Finding", "examine"]

DEADLINE_S: Final = 2.0
"""For all checks together, beside half a second of imports: an operator who waits longer starts to guess."""
ANSWER_S: Final = 1.0
"""For an agent or an fsmount that runs: each answers within milliseconds."""

Check = Callable[[], Awaitable[list[Finding]]]
_T = TypeVar("_T")


def examine(settings: Settings) -> list[Finding]:
    """Look at everything; never raises for what it finds, never changes anything, and ends after a few seconds."""
    # The trial's processes start while this one is still importing.
    with _start_trial(settings) as trial:
        return trio.run(_Examination(settings, trial).run)


@contextmanager
def _start_trial(settings: Settings) -> Iterator[Trial | str]:
    """The trial, or why there is none."""
    with ExitStack() as stack:
        trial: Trial | str = "only root can try mounts"
        if os.geteuid() == 0:
            has_fsmount = _listens(settings.run_dir / "fsmount.sock")
            place = machine.nearest_directory(settings.state_dir)
            try:
                trial = stack.enter_context(open_trial(place, with_fsmount=not has_fsmount))
            except OSError as exc:
                trial = f"nothing could be tried: {exc}"
        yield trial


def _listens(path: Path) -> bool:
    """Is there somebody behind a unix socket? A file that a dead process left behind is nobody."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(ANSWER_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class _Examination:
    """One run of all checks."""

    def __init__(self, settings: Settings, trial: Trial | str) -> None:
        self._settings = settings
        self._trial = trial
        self._threads = trio.CapacityLimiter(32)

    async def run(self) -> list[Finding]:
        """All findings, in the order of the checks below."""
        settings, blocking = self._settings, self._blocking
        status, of_agent = await self._ask_agent()
        with without_decoration():
            # gRPC, TLS and HTTP take their time to load; meanwhile the trial goes on.
            from agent.observe import surroundings  # noqa: PLC0415
            from agent.store.sparse import punch_hole  # noqa: PLC0415

        peers = None if status is None else int(status.get("peers", 0))
        checks: dict[str, Check] = {
            "root": blocking(machine.check_root),
            "fuse": blocking(machine.check_fuse),
            "mounting": self._try_mounts,
            "state_dir": blocking(partial(machine.check_state_dir, settings, punch_hole)),
            "run_dir": blocking(partial(machine.check_run_dir, settings)),
            "open files": blocking(machine.check_limits),
            "clock": blocking(machine.check_clock),
            "containerd": partial(surroundings.check_containerd, settings),
            "registries": blocking(partial(surroundings.check_hosts_dir, settings)),
            "registry credentials": blocking(partial(surroundings.check_docker_config, settings)),
            "fleet secret": blocking(partial(surroundings.check_secret, settings)),
            "bootstrap peers": partial(surroundings.check_bootstrap, settings, peers),
            "ports": blocking(partial(surroundings.check_ports, settings, status)),
        }
        results: dict[str, list[Finding]] = {}
        deadline = trio.current_time() + DEADLINE_S
        async with trio.open_nursery() as nursery:
            for subject, check in checks.items():
                nursery.start_soon(_run_check, subject, check, deadline, results)
        return [finding for subject in checks for finding in results[subject]] + of_agent

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        # The stubs of trio-typing, which a dependency brings, are older than trio and hide its own types.
        done: _T = await trio.to_thread.run_sync(work, limiter=self._threads, abandon_on_cancel=True)  # type: ignore[call-arg]
        return done

    def _blocking(self, work: Callable[[], list[Finding]]) -> Check:
        return partial(self._in_thread, work)

    async def _ask_agent(self) -> tuple[dict[str, Any] | None, list[Finding]]:
        """The status of the agent that runs with this run directory, and what is to be said of it."""
        run_dir = self._settings.run_dir
        status: dict[str, Any] | None = None
        with trio.move_on_after(ANSWER_S):
            try:
                status = await self._in_thread(partial(call, run_dir, "status"))
            except LinkError:
                return None, [
                    note("agent", f"none runs with run_dir {run_dir}", f"shoal agent --run-dir {run_dir}, or start its unit")
                ]
            except ShoalError as exc:
                return None, [error("agent", f"it answers with an error: {exc}", "see its log")]
        if status is None:
            text = f"one runs at {run_dir} and does not answer"
            return None, [error("agent", text, "see its log; restart it: containers go on meanwhile")]
        try:
            installed = version("shoal")
        except PackageNotFoundError:
            installed = ""
        return status, list(machine.judge_status(status, installed))

    async def _try_mounts(self) -> list[Finding]:
        """Mounts that the trial has made, and which presentations work: by the fsmount that runs, else by a private one."""
        trial, settings = self._trial, self._settings
        info = await _ask_fsmount(settings.run_dir)
        found: list[Finding] = []
        if isinstance(trial, str):
            found.append(note("mounting", f"{trial}, so mounts were not tried"))
        else:
            found += await self._judge_trial(trial, has_fsmount=info is not None)
        if info is not None:
            said_by = f"says fsmount, process {info.pid}"
            found.append(machine.judge_presentations(info.presentations, {}, settings.presentation, said_by))
            if info.version != fsmount_version:
                found.append(
                    note(
                        "fsmount",
                        f"version {info.version} runs, {fsmount_version} is installed",
                        f"shoal fsmount --upgrade --run-dir {settings.run_dir}; readers wait a moment, none fails",
                    )
                )
        return [*found, *machine.check_file_systems()]

    async def _judge_trial(self, trial: Trial, *, has_fsmount: bool) -> list[Finding]:
        is_ready = await self._in_thread(partial(trial.wait, DEADLINE_S))
        found = list(machine.judge_attempts(trial.attempts, self._settings.state_dir))
        last = trial.last_words[-1] if trial.last_words else "it said nothing"
        if not trial.attempts:
            found.append(error("mounting", f"nothing could be tried: {last}", "apt-get install util-linux (setpriv, unshare)"))
        elif has_fsmount or trial.attempts.get("fuse"):
            return found
        elif not trial.with_fsmount:
            text = f"something listens at {self._settings.run_dir / 'fsmount.sock'} and does not answer"
            found.append(error("fsmount", text, "see RUN_DIR/fsmount.log; end what listens there, the agent starts fsmount anew"))
        elif is_ready:
            async with open_link(trial.scratch / "run") as link:
                trial.hear_rest()
                found.append(
                    machine.judge_presentations(
                        link.info.presentations, trial.refused, self._settings.presentation, "tried just now"
                    )
                )
        else:
            found.append(
                error("fsmount", f"one started for a trial did not come up: {last}", "see RUN_DIR/fsmount.log of a real start")
            )
        return found


async def _run_check(subject: str, check: Check, deadline: float, results: dict[str, list[Finding]]) -> None:
    results[subject] = [warning(subject, "no answer in time", "what it depends on hangs or is very busy; try again")]
    with trio.CancelScope(deadline=deadline):
        try:
            results[subject] = await check()
        except Exception as exc:  # noqa: BLE001 - the component's edge: one broken check must not hide the others
            results[subject] = [error(subject, f"this check itself failed: {exc!r}", "please report it")]


async def _ask_fsmount(run_dir: Path) -> FsmountInfo | None:
    """What the fsmount of this run directory says, None if none answers."""
    info: FsmountInfo | None = None
    with trio.move_on_after(ANSWER_S):
        try:
            async with open_link(run_dir) as link:
                info = link.info
        except LinkError:
            return None
    return info
