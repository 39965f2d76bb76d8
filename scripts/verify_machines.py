#!/usr/bin/env python3
"""Show on a configuration of yours that a run on two machines is right, and what becomes of it if one is lost.

    sudo .venv/bin/python scripts/verify_machines.py CONFIG.yaml [--option value ...]
    sudo .venv/bin/python scripts/verify_machines.py --ranks 2 --only equal,cut CONFIG.yaml [--option value ...]

The two machines are network namespaces of this one, joined by a cable of their own (a veth pair), each with a name
and torchrun; ranks exchange over Gloo. Root may make these on Linux, and nobody else. What is tried:

    equal     two machines end with the same bits as one with as many ranks, however torchrun makes them meet
    killed    all processes of a machine are killed: the other one names what it has lost, in at most 30 s
    cut       the cable is cut: both name what they have lost, `rank-timeout` and at most 30 s later
    restarts  the ranks of a machine are killed, and torchrun, with --max-restarts 1, goes on by itself
    alone     what two machines have begun is finished by one

The last two are compared too: they are to end like a run that nothing has happened to (one machine alone takes
as many ranks). `max-update` is --updates; `save-dir` is not touched: runs go to a temporary folder, which both
machines see. Exit code: 0 if all is well, 1 if something is not, 2 for what is wrong with the configuration or
where such machines cannot be made.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nmt.cli.command import run_command
from nmt.errors import UserError
from nmt.run.run_log import read_records

PROG = "verify_machines"
CHECKS = ("equal", "killed", "cut", "restarts", "alone")
PORT = 29411
TIMEOUT = 12.0  # seconds that a rank waits for another one, where the cable is cut
PATIENCE = 30.0  # seconds more until all processes have ended
LONGEST = 600.0  # seconds of a run
ENDLESS = 1_000_000


class Machine:
    """A network namespace with an address, a name of its own and what runs in it."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = address
        self.namespace = f"nmt-{os.getpid()}-{name}"
        self.cable = f"nmt{os.getpid()}{name[-1]}"  # the name of its end: 15 characters at most
        self.said = folder / f"{name}.log"
        self._hosts = folder / "hosts"
        self.launcher: subprocess.Popen[bytes] | None = None

    def start(self, arguments: Sequence[object]) -> None:
        """Start torchrun with these arguments."""
        # Names of machines are looked up in a file of their own.
        begin = f"hostname {self.name} && mount --bind '{self._hosts}' /etc/hosts && exec \"$@\""
        command = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", begin, "sh"]
        command += [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "GLOO_SOCKET_IFNAME": self.cable}
        with self.said.open("wb") as said:
            self.launcher = subprocess.Popen(command, stdout=said, stderr=said, env=environment)

    def processes(self) -> list[int]:
        """Return the numbers of all its processes."""
        return [int(number) for number in ip("netns", "pids", self.namespace).split()]

    def ranks(self) -> list[int]:
        """Return the processes that torchrun has started."""
        assert self.launcher is not None
        return [number for number in self.processes() if parent_of(number) == self.launcher.pid]

    def kill(self) -> None:
        """End all its processes at once, as a loss of power does."""
        for number in self.processes():
            kill(number)

    def wait(self, seconds: float) -> int | None:
        """Return the exit code of torchrun, or None if it has not ended after so many seconds."""
        assert self.launcher is not None
        try:
            return self.launcher.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None

    def error_lines(self) -> list[str]:
        """Return what the ranks have said of what they have lost."""
        lines = self.said.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if "error: this rank cannot go on alone: " in line]


def ip(*arguments: object) -> str:
    """Run `ip` and return what it prints."""
    done = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"`ip` must be permitted to make machines, but says: {done.stderr.strip()}. "
            "Run this as root, on Linux."
        )
    return done.stdout


def parent_of(number: int) -> int:
    try:
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0


def kill(number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


@contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Make two machines, joined by a cable; nothing of them is left at the end."""
    for needed in ("ip", "unshare", "mount"):
        if shutil.which(needed) is None:
            raise UserError(
                f"The program `{needed}` must be installed, but is not. Install iproute2 and util-linux."
            )
    machines = Machine("machine-a", "10.87.211.1", folder), Machine("machine-b", "10.87.211.2", folder)
    lines = [f"{machine.address} {machine.name}\n" for machine in machines]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    try:
        for machine in machines:
            ip("netns", "add", machine.namespace)
        a, b = machines
        peer = ("peer", "name", b.cable, "netns", b.namespace)
        ip("link", "add", a.cable, "netns", a.namespace, "type", "veth", *peer)
        for machine in machines:
            ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", machine.cable)
            for device in ("lo", machine.cable):
                ip("-n", machine.namespace, "link", "set", device, "up")
        yield machines
    finally:
        for machine in machines:
            if (Path("/run/netns") / machine.namespace).exists():
                machine.kill()
                ip("netns", "del", machine.namespace)  # and with it the cable


class Runs:
    """Starts runs of the configuration on the machines, and compares what they have come to."""

    def __init__(self, machines: tuple[Machine, Machine], folder: Path, given: argparse.Namespace) -> None:
        self.machines = machines
        self.folder = folder
        self.given = given
        self._options = [given.config.resolve(), *given.overrides]

    def start(
        self, name: str, *options: object, static: bool = False, max_restarts: int = 0, updates: int = 0
    ) -> None:
        """Start a run on both machines."""
        first = self.machines[0].address
        for number, machine in enumerate(self.machines):
            launch: list[object] = ["--nnodes", 2, "--nproc-per-node", self.given.ranks]
            if static:
                launch += ["--node-rank", number, "--master-addr", first, "--master-port", PORT]
            else:
                launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{PORT}", "--rdzv-id", name]
                launch += ["--local-addr", machine.address]
            machine.start([*launch, "--max-restarts", max_restarts, *self._train(name, updates), *options])

    def on_one_machine(self, name: str) -> None:
        """Make a run on this machine with as many ranks, or finish one."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(2 * self.given.ranks), *map(str, self._train(name, 0))]
        done = subprocess.run(
            command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ}
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error: " in line]
            raise UserError(f"a run on one machine failed: {(errors or done.stderr.splitlines())[-1]}")

    def _train(self, name: str, updates: int) -> list[object]:
        options: list[object] = ["-m", "nmt.cli.train", "--config", *self._options]
        options += ["--save-dir", self.folder / name, "--max-update", updates or self.given.updates]
        interval = max(self.given.updates // 4, 1)
        return [*options, "--log-interval", 1, "--save-interval-updates", interval, "--device", "cpu"]

    def wait_for_checkpoint(self, name: str) -> None:
        """Wait until a run has saved once and has gone on from there."""
        folder, deadline = self.folder / name, time.monotonic() + LONGEST
        while time.monotonic() < deadline and all(machine.wait(0.1) is None for machine in self.machines):
            saved = list((folder / "checkpoints").glob("update-*"))
            if saved and read_records(folder)[0][-1]["update"] > int(saved[0].name[7:]) + 1:
                return
        raise UserError(f"the run `{name}` came to no checkpoint: {self._last_line()}")

    def wait_for_end(self) -> None:
        """Wait until a run is finished."""
        deadline = time.monotonic() + LONGEST
        for machine in self.machines:
            if machine.wait(deadline - time.monotonic()) != 0:
                raise UserError(f"a run on two machines failed: {self._last_line()}")

    def equals_one_machine(self, name: str) -> bool:
        """Say whether a run ends with the same bits as one on one machine that nothing has happened to."""
        if not (self.folder / "one").exists():
            self.on_one_machine("one")
        place = Path("checkpoints") / f"update-{self.given.updates:07d}"
        return all(
            (self.folder / name / place / file).read_bytes()
            == (self.folder / "one" / place / file).read_bytes()
            for file in ("model.safetensors", "optimizer.safetensors")
        )

    def _last_line(self) -> str:
        errors = [
            line
            for machine in self.machines
            for line in machine.said.read_text(errors="replace").splitlines()
            if "error: " in line or "Error: " in line
        ]
        return (errors or ["nothing is said of why"])[0]


def check_equal(runs: Runs) -> Iterator[tuple[str, bool]]:
    for how, static in (("c10d", False), ("static", True)):
        runs.start(f"equal-{how}", static=static)
        runs.wait_for_end()
        yield f"two machines that meet by {how} end like one", runs.equals_one_machine(f"equal-{how}")


def check_killed(runs: Runs) -> Iterator[tuple[str, bool]]:
    for lost, left in (runs.machines, runs.machines[::-1]):
        name = f"killed-{lost.name}"
        runs.start(name, updates=ENDLESS)
        runs.wait_for_checkpoint(name)
        lost.kill()
        yield from named(left, lost, within=PATIENCE)
        left.kill()


def check_cut(runs: Runs) -> Iterator[tuple[str, bool]]:
    a, b = runs.machines
    runs.start("cut", "--rank-timeout", TIMEOUT / 60, updates=ENDLESS)
    runs.wait_for_checkpoint("cut")
    ip("-n", b.namespace, "link", "set", b.cable, "down")
    try:
        yield from named(a, b, within=TIMEOUT + PATIENCE)
        yield from named(b, a, within=TIMEOUT + PATIENCE)
    finally:
        for machine in runs.machines:
            machine.kill()
        ip("-n", b.namespace, "link", "set", b.cable, "up")


def named(left: Machine, lost: Machine, *, within: float) -> Iterator[tuple[str, bool]]:
    """Wait until the ranks of a machine have ended, and look at how they name the one that they have lost."""
    start = time.monotonic()
    while (ranks := left.ranks()) and time.monotonic() - start < within:
        time.sleep(0.1)
    lines = left.error_lines()
    is_right = not ranks and bool(lines) and all(f"on {lost.name}" in line for line in lines)
    yield f"{left.name} has lost {lost.name} and says: {(lines or ['nothing'])[0]}", is_right


def check_restarts(runs: Runs) -> Iterator[tuple[str, bool]]:
    runs.start("restarts", max_restarts=1)
    runs.wait_for_checkpoint("restarts")
    for number in runs.machines[1].ranks():
        kill(number)
    runs.wait_for_end()
    yield "torchrun goes on after ranks were killed, and ends alike", runs.equals_one_machine("restarts")


def check_alone(runs: Runs) -> Iterator[tuple[str, bool]]:
    runs.start("alone")
    runs.wait_for_checkpoint("alone")
    for machine in runs.machines:
        machine.kill()
    runs.on_one_machine("alone")
    yield "one machine finishes what two began, and ends alike", runs.equals_one_machine("alone")


def main() -> None:
    """Make the machines and try what is wanted."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, default=1, help="of each machine")
    parser.add_argument("--updates", type=int, default=40, help="length of a run that is finished")
    parser.add_argument("--only", default=",".join(CHECKS), help="some of these, with commas between")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="options of nmt-train")
    given = parser.parse_args()
    if given.ranks < 1 or given.updates < 8 or not set(given.only.split(",")) <= set(CHECKS):
        parser.error(f"--ranks must be at least 1, --updates at least 8, and --only of {','.join(CHECKS)}")
    is_right = True

    def body() -> None:
        nonlocal is_right
        with tempfile.TemporaryDirectory() as temporary, two_machines(Path(temporary)) as machines:
            runs = Runs(machines, Path(temporary), given)
            for name in given.only.split(","):
                for text, holds in globals()[f"check_{name}"](runs):
                    print(f"{'right' if holds else 'WRONG'}: {text}", flush=True)
                    is_right = is_right and holds

    run_command(PROG, body)
    raise SystemExit(0 if is_right else 1)


if __name__ == "__main__":
    main()
