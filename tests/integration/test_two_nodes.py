"""Two machines, as two network namespaces with an sshd each: `deepspeed --hostfile` trains on 2 x 2 ranks.

Needs root, Debian's iproute2, openssh-server and pdsh, and a kernel that permits network namespaces; skipped with the
reason where one is missing. The two share the file system, as a cluster's machines share a run folder. All traffic
stays on the pair of virtual interfaces between them.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from training_runs import STEPS, final_hashes, losses

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
NODES = {f"lightbulb-{os.getpid()}-{name}": address for name, address in (("a", "10.77.0.1"), ("b", "10.77.0.2"))}
SSH_PORT = 2222


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def missing() -> str | None:
    """Why this machine cannot run the test."""
    programs = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [package for program, package in programs.items() if shutil.which(program, path=search) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"lightbulb-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode != 0:
        return "network namespaces are not permitted here"
    run("ip", "netns", "delete", probe)
    return None


@pytest.fixture
def network() -> Iterator[list[str]]:
    """Two namespaces joined by one cable; gives their names."""
    if reason := missing():
        pytest.skip(reason)
    first, second = NODES
    cable = f"lb{os.getpid()}"
    with ExitStack() as cleanup:
        for name in NODES:
            run("ip", "netns", "add", name)
            cleanup.callback(run, "ip", "netns", "delete", name)
        run("ip", "link", "add", f"{cable}a", "netns", first, "type", "veth", "peer", f"{cable}b", "netns", second)
        for (name, address), end in zip(NODES.items(), (f"{cable}a", f"{cable}b"), strict=True):
            for words in (["link", "set", "lo", "up"], ["addr", "add", f"{address}/24", "dev", end],
                          ["link", "set", end, "up"]):  # fmt: skip
                run("ip", "-n", name, *words)
        yield [first, second]


@pytest.fixture
def ssh(network: list[str], tmp_path: Path) -> Iterator[Path]:
    """An sshd in each namespace with keys of its own; gives a folder with an ``ssh`` that knows them."""
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    for key in ("host", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / key)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd refuses to start without
    daemons = []
    for name, address in NODES.items():
        config = keys / f"sshd-{name}"
        config.write_text(
            f"Port {SSH_PORT}\nListenAddress {address}\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\n"
            f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n"
        )
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")
        daemons.append(subprocess.Popen(["ip", "netns", "exec", name, str(sshd), "-D", "-f", config]))
    (keys / "config").write_text(
        f"Host *\n  Port {SSH_PORT}\n  IdentityFile {keys}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {keys}/config "$@"\n')
    (folder / "ssh").chmod(0o755)
    try:
        for address in NODES.values():
            _await_ssh(network[0], folder, address)
        yield folder
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()


def _await_ssh(node: str, folder: Path, address: str) -> None:
    end = time.monotonic() + 20.0
    command = ["ip", "netns", "exec", node, folder / "ssh", address, "true"]
    while (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        assert time.monotonic() < end, done.stderr
        time.sleep(0.1)


def test_two_machines_train_what_one_does(network: list[str], ssh: Path, run_file, start, tmp_path: Path) -> None:
    layout = ["parallel.pipeline=2", "parallel.expert=2", "train.global_batch_size=8"]
    local = start("pretrain", [str(run_file("local")), *layout], world_size=4)
    assert local.wait() == 0, local.text()
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=2\n" for address in NODES.values()))
    (tmp_path / "environment").write_text("OMP_NUM_THREADS=1\n")
    environment = os.environ | {"PATH": f"{ssh}:{BIN}:{os.environ['PATH']}", "DS_ENV_FILE": f"{tmp_path}/environment"}
    command = ["ip", "netns", "exec", network[0], BIN / "deepspeed", "--hostfile", hosts]
    command += [ROOT / "launcher" / "pretrain.py", run_file("spread"), *layout]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for address in NODES.values():
        assert f"{address}: " in done.stdout + done.stderr  # pdsh puts the machine before each line
    assert "TP1xPP2xEP2xDP2" in (tmp_path / "spread" / "summary.json").read_text()
    assert len(losses(tmp_path / "spread")) == STEPS
    assert losses(tmp_path / "spread") == losses(tmp_path / "local")
    assert final_hashes(tmp_path / "spread") == final_hashes(tmp_path / "local")
