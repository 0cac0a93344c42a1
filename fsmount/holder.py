"""The small parent that keeps the FUSE mount alive: `python -S -m fsmount.holder --run-dir DIR`.

It opens /dev/fuse, mounts run_dir/fs, answers the kernel's INIT, and starts the worker (`fsmount.main`) with the descriptor.
While it holds that descriptor the kernel queues requests instead of failing them, whatever becomes of workers: one that dies is
replaced at once (with growing pauses if it dies before it was ready), one that is upgraded is replaced when its successor has
loaded. The holder also keeps the listening socket of the link, so that an agent's connection waits for the successor.

Standard library only; one thread; one poll loop. If the holder itself dies the worker starts another (`--adopt`) and goes on:
both would have to die at the same moment for the mount to be lost. The same way the holder changes its own program: it execs
the new one, which adopts.

Words on the control socket, one a line. Worker to holder: `prepared` (loaded, may take the descriptor), `ready`, `unmounted`.
Holder to worker: `go` (the descriptor is yours), `drain` (finish changes, then exit), `stop` (unmount everything, then exit).
"""

import fcntl
import json
import os
import secrets
import select
import signal
import socket
import sys
import time
from typing import Any, Final, NoReturn

from fsmount import __version__, syscalls
from fsmount.arguments import parse_flags
from fsmount.handshake import answer_init

_PREPARE_S: Final = 30.0
_DRAIN_S: Final = 15.0
_STOP_S: Final = 20.0
_MAX_PAUSE_S: Final = 5.0


class Worker:
    """A worker process: started by us, or adopted from a holder before us."""

    def __init__(self, pid: int, control: socket.socket, program: tuple[str, str], *, is_ready: bool) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.control = control
        self.program = program
        self.is_ready = is_ready
        self.is_prepared = is_ready
        self.buffer = b""

    def tell(self, word: str) -> None:
        """Send a word; a dead worker is noticed elsewhere."""
        try:
            self.control.send(word.encode() + b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            log(f"cannot tell worker {self.pid} {word}: {error}")

    def words(self) -> list[str]:
        """What it has said since the last call."""
        try:
            self.buffer += self.control.recv(4096, socket.MSG_DONTWAIT)
        except OSError:
            return []
        *lines, self.buffer = self.buffer.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def reap(self) -> None:
        """Collect its exit, if it is our child, and close what is left."""
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            log(f"worker {self.pid} was adopted; its exit status is not known")
        os.close(self.pidfd)
        self.control.close()


def log(text: str) -> None:
    """A line in run_dir/fsmount.log."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} holder {text}\n")
    sys.stderr.flush()


class Holder:
    """The poll loop and what it knows."""

    def __init__(
        self, flags: dict[str, str], fuse: int, listener: socket.socket, lock: int, mount_token: str, requests: int
    ) -> None:
        self.run_dir = flags["run-dir"]
        self.flags = flags
        self.fuse = fuse
        self.listener = listener
        self.lock = lock
        self.mount_token = mount_token
        self.program = (sys.executable, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self.worker: Worker | None = None
        self.standby: Worker | None = None
        self.restarts = 0
        self.failures = 0
        self.start_at: float | None = None
        self.give_up_at: float | None = None
        self.waiting: socket.socket | None = None
        self.old_pid = 0
        self.is_stopping = False
        self.ready_waiters: list[socket.socket] = []
        self.requests = socket.socket(fileno=requests) if requests >= 0 else bind(f"{self.run_dir}/holder.sock")
        self.wake, wake = socket.socketpair()
        self._wake_end = wake
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    # Workers

    def spawn(self, program: tuple[str, str]) -> Worker:
        """Start a worker; it loads and says `prepared`."""
        ours, theirs = socket.socketpair()
        python, path = program
        fds = {self.fuse: "--fuse-fd", self.listener.fileno(): "--listen-fd", theirs.fileno(): "--control-fd"}
        command = [python, "-m", "fsmount.main", "--run-dir", self.run_dir, "--mount", self.mount_token]
        command += ["--read-deadline-s", self.flags["read-deadline-s"], "--presentation", self.flags["presentation"]]
        command += ["--holder-pid", str(os.getpid())]
        for fd, flag in fds.items():
            os.set_inheritable(fd, True)
            command += [flag, str(fd)]
        # One malloc arena: answers of 1 MiB made in disk threads would otherwise leave one grown arena each.
        environment = {**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}
        try:
            pid = os.posix_spawn(python, command, environment, setsigdef=[signal.SIGTERM, signal.SIGINT])
        finally:
            theirs.close()
        return Worker(pid, ours, program, is_ready=False)

    def start_worker(self) -> None:
        """Start the worker, or try again later."""
        self.start_at = None
        try:
            self.worker = self.spawn(self.program)
        except OSError as error:
            log(f"cannot start {self.program[0]}: {error}")
            self.plan_start()

    def plan_start(self) -> None:
        """At once after one that had been ready; with growing pauses otherwise."""
        pause = 0.0 if not self.failures else min(_MAX_PAUSE_S, 0.1 * 2 ** min(self.failures - 1, 10))
        self.failures += 1
        self.start_at = time.monotonic() + pause

    def hear(self, worker: Worker) -> None:
        """Act on what a worker said."""
        for word in worker.words():
            if word == "prepared":
                worker.is_prepared = True
                if worker is self.standby and self.worker is not None:
                    self.worker.tell("drain")
                    self.give_up_at = time.monotonic() + _DRAIN_S
                else:
                    worker.tell("go")
            elif word == "ready":
                worker.is_ready = True
                self.failures = 0
                log(f"worker {worker.pid} is ready")
                for client in self.ready_waiters:
                    reply(client, {"pid": worker.pid})
                self.ready_waiters.clear()
                if self.waiting is not None and not self.is_stopping and worker is self.worker:
                    self.answer({"old_pid": self.old_pid, "new_pid": worker.pid})
                    self.give_up_at = None
                    self.become_new()
            elif word == "unmounted":
                log("everything is unmounted")

    def lost(self, worker: Worker) -> None:
        """A worker is gone."""
        worker.reap()
        if worker is self.standby:
            self.standby = None
            self.give_up_at = None
            log(f"the new program's worker {worker.pid} ended before it took over")
            self.answer({"error": "the new program did not come up; the old one goes on (see fsmount.log)"})
            return
        self.worker = None
        if self.is_stopping:
            self.finish()
        elif self.standby is not None and self.standby.is_prepared:
            self.worker, self.standby = self.standby, None
            self.program = self.worker.program
            self.worker.tell("go")
            self.give_up_at = time.monotonic() + _PREPARE_S
        else:
            log(f"worker {worker.pid} died; starting another")
            self.restarts += 1
            self.plan_start()

    # Requests

    def answer(self, found: dict[str, Any]) -> None:
        """Answer whoever waits for the upgrade or the stop."""
        if self.waiting is not None:
            reply(self.waiting, found)
            self.waiting = None

    def serve_request(self) -> None:
        """Take one connection and do what it asks."""
        client, _ = self.requests.accept()
        client.settimeout(1)
        try:
            request = json.loads(client.makefile("rb").readline(65536))
            operation = request["op"]
        except (OSError, ValueError, KeyError, TypeError):
            reply(client, {"error": "not a request"})
            return
        worker = self.worker
        if operation == "status":
            facts = {"holder_pid": os.getpid(), "pid": worker.pid if worker else 0, "version": __version__}
            reply(client, {**facts, "restarts": self.restarts, "is_ready": worker is not None and worker.is_ready})
        elif operation == "wait" and worker is not None and worker.is_ready:
            reply(client, {"pid": worker.pid})
        elif operation == "wait" and not self.is_stopping:
            self.ready_waiters.append(client)
        elif self.waiting is not None or self.is_stopping:
            reply(client, {"error": "another upgrade or stop is under way"})
        elif operation == "upgrade" and worker is not None and worker.is_ready:
            try:
                self.standby = self.spawn((str(request["python"]), str(request["path"])))
            except (OSError, KeyError) as error:
                reply(client, {"error": f"cannot start the new program: {error}"})
                return
            self.waiting, self.old_pid = client, worker.pid
            self.give_up_at = time.monotonic() + _PREPARE_S
        elif operation == "upgrade":
            reply(client, {"error": "no worker is ready to be replaced; try again"})
        elif operation == "stop":
            self.waiting = client
            self.stop()
        else:
            reply(client, {"error": f"no such request: {operation!r}"})

    def stop(self) -> None:
        """Begin the end: the worker unmounts, then we do the rest."""
        self.is_stopping = True
        self.give_up_at = time.monotonic() + _STOP_S
        if self.standby is not None:
            os.kill(self.standby.pid, signal.SIGKILL)
        if self.worker is not None:
            self.worker.tell("stop")
        else:
            self.finish()

    def finish(self) -> NoReturn:
        """Unmount what is left, answer, exit."""
        unmount_below(self.run_dir)
        os.close(self.fuse)
        for name in ("holder.sock", "fsmount.sock", "fsmount.state"):
            try:
                os.unlink(f"{self.run_dir}/{name}")
            except OSError as error:
                log(f"cannot remove {name}: {error}")
        log("stopped")
        self.answer({"stopped": True})
        sys.exit(0)

    def gave_up(self) -> None:
        """A worker did not do in time what it was told."""
        self.give_up_at = None
        if self.is_stopping or (self.standby is not None and self.standby.is_prepared):
            if self.worker is not None:
                log(f"worker {self.worker.pid} does not end; killing it")
                os.kill(self.worker.pid, signal.SIGKILL)
        elif self.standby is not None:
            os.kill(self.standby.pid, signal.SIGKILL)
        else:
            self.answer({"error": "the new worker was started and does not get ready (see fsmount.log)"})

    def become_new(self) -> None:
        """Exec the holder of the new program; on failure go on as we are."""
        worker, (python, path) = self.worker, self.program
        if worker is None:
            return
        fds = [self.fuse, self.listener.fileno(), self.lock, self.requests.fileno(), worker.control.fileno()]
        for fd in fds:
            os.set_inheritable(fd, True)
        adopt = ",".join(map(str, [*fds, worker.pid]))
        command = [python, "-S", "-m", "fsmount.holder", "--run-dir", self.run_dir, "--adopt", adopt, "--mount", self.mount_token]
        command += ["--read-deadline-s", self.flags["read-deadline-s"], "--presentation", self.flags["presentation"]]
        try:
            os.execve(python, command, {**os.environ, "PYTHONPATH": path})  # noqa: S606  our own program
        except OSError as error:
            log(f"cannot change to the holder of {path}: {error}")

    def run(self) -> NoReturn:
        """The loop."""
        while True:
            poll = select.poll()
            actors: dict[int, Any] = {self.requests.fileno(): None, self.wake.fileno(): None}
            for worker in (self.worker, self.standby):
                if worker is not None:
                    actors[worker.control.fileno()] = actors[worker.pidfd] = worker
            for fd in actors:
                poll.register(fd, select.POLLIN)
            moments = [moment for moment in (self.start_at, self.give_up_at) if moment is not None]
            pause = None if not moments else max(0.0, min(moments) - time.monotonic()) * 1000 + 1
            happened = [fd for fd, _ in poll.poll(pause)]
            for fd in happened:
                worker = actors[fd]
                if worker is not None and fd == worker.control.fileno():
                    self.hear(worker)
            for fd in happened:
                worker = actors[fd]
                if worker is not None and worker in (self.worker, self.standby) and fd == worker.pidfd:
                    self.lost(worker)
            if (
                self.wake.fileno() in happened
                and set(self.wake.recv(64)) & {signal.SIGTERM, signal.SIGINT}
                and not self.is_stopping
            ):
                log("told to stop")
                self.stop()
            if self.requests.fileno() in happened:
                self.serve_request()
            now = time.monotonic()
            if self.start_at is not None and now >= self.start_at and not self.is_stopping:
                self.start_worker()
            if self.give_up_at is not None and now >= self.give_up_at:
                self.gave_up()


def reply(client: socket.socket, found: dict[str, Any]) -> None:
    """Answer a request and end its connection."""
    try:
        client.sendall(json.dumps(found).encode() + b"\n")
    except OSError as error:
        log(f"nobody waits for the answer: {error}")
    client.close()


def bind(path: str) -> socket.socket:
    """A listening socket for root alone, in place of a dead one."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        log(f"listening on {path}")
    # A path in sockaddr_un is limited to 107 bytes; through the directory's descriptor any run_dir will do.
    directory = os.open(os.path.dirname(path), os.O_PATH)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        finally:
            os.umask(mask)
    finally:
        os.close(directory)
    listener.listen(64)
    return listener


def unmount_below(run_dir: str) -> None:
    """Detach every mount under `run_dir`, the newest first."""
    for entry in reversed(syscalls.mounted()):
        if entry.path.startswith(f"{run_dir}/"):
            try:
                syscalls.unmount(entry.path)
            except OSError as error:
                log(f"cannot unmount {entry.path}: {error}")


def open_mount(run_dir: str) -> int:
    """Mount run_dir/fs and answer the kernel's INIT; the descriptor that serves it."""
    unmount_below(run_dir)
    target = f"{run_dir}/fs"
    os.makedirs(target, mode=0o755, exist_ok=True)
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    syscalls.mount("shoal", target, "fuse.shoal", syscalls.MS_RDONLY, options)
    os.write(fuse, answer_init(os.read(fuse, 65536)))
    return fuse


def _take_lock(run_dir: str) -> int:
    """The lock of the one holder of a run_dir; -1 if another has it."""
    lock = os.open(f"{run_dir}/holder.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return -1
    return lock


def _answers(path: str) -> bool:
    """Whether somebody listens: a worker that outlived its holder and is about to start another."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        directory = os.open(os.path.dirname(path), os.O_PATH)
        try:
            probe.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        except OSError:
            return False
        finally:
            os.close(directory)
        return True


def detach(run_dir: str) -> None:
    """Go on as a process of its own session, with the log as output; the caller's process waits until that has begun."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        words = b""
        while data := os.read(read, 4096):
            words += data
        if words != b"ok":
            sys.stderr.write(words.decode(errors="replace") or "the holder ended at once\n")
            os._exit(1)
        os._exit(0)
    os.close(read)
    os.setsid()
    output = os.open(f"{run_dir}/fsmount.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    nothing = os.open("/dev/null", os.O_RDWR)
    try:
        holder = start(run_dir, nothing, output)
    except OSError as error:
        os.write(write, f"cannot mount {run_dir}/fs: {error}\n".encode())
        os._exit(1)
    os.write(write, b"ok")
    os.close(write)
    if holder is not None:
        holder.run()
    sys.exit(0)


def start(run_dir: str, nothing: int, output: int) -> Holder | None:
    """A holder with a fresh mount; None if one is there already."""
    lock = _take_lock(run_dir)
    if lock < 0 or _answers(f"{run_dir}/fsmount.sock"):
        return None
    fuse = open_mount(run_dir)
    listener = bind(f"{run_dir}/fsmount.sock")
    for fd in (0, 1, 2):
        os.dup2(nothing if fd == 0 else output, fd)
    holder = Holder(FLAGS, fuse, listener, lock, secrets.token_hex(8), -1)
    holder.start_worker()
    return holder


def adopt(flags: dict[str, str]) -> Holder:
    """A holder in place of one that died or exec'd us, for a worker that lives."""
    fuse, listen, lock, requests, control, pid = map(int, flags["adopt"].split(","))
    for fd in (fuse, listen, lock, requests, control):
        if fd >= 0:
            os.set_inheritable(fd, False)
    if lock < 0:
        lock = _take_lock(flags["run-dir"])
        if lock < 0:
            log("another holder is there")
            sys.exit(1)
    holder = Holder(flags, fuse, socket.socket(fileno=listen), lock, flags["mount"], requests)
    holder.worker = Worker(pid, socket.socket(fileno=control), holder.program, is_ready=True)
    log(f"adopted worker {pid}")
    return holder


FLAGS: dict[str, str] = {"read-deadline-s": "30", "presentation": "auto"}


def main() -> NoReturn:
    """The program."""
    FLAGS.update(parse_flags(sys.argv[1:]))
    run_dir = FLAGS["run-dir"] = os.path.abspath(FLAGS["run-dir"])
    syscalls.name_process("shoal-holder")
    if "adopt" in FLAGS:
        adopt(FLAGS).run()
    os.makedirs(run_dir, exist_ok=True)
    if "foreground" not in FLAGS:
        detach(run_dir)
    holder = start(run_dir, os.open("/dev/null", os.O_RDWR), 2)
    if holder is not None:
        holder.run()
    sys.exit(0)


if __name__ == "__main__":
    main()
