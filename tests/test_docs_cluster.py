"""Checks the cluster templates and docs/CLUSTER.md: the files are valid, and main.py accepts the commands in them."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from yacs.config import CfgNode

import main
from tests.faults import hosts
from utils.paths import REPO_ROOT

SLURM = REPO_ROOT / "docs" / "cluster" / "slurm.sbatch"
KUBERNETES = REPO_ROOT / "docs" / "cluster" / "pytorchjob.yaml"


@pytest.fixture
def parse_main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], CfgNode]:
    """Parses the arguments of main.py for real, up to where data would be read, and returns the configuration."""
    monkeypatch.chdir(REPO_ROOT)

    def parse(words: list[str]) -> CfgNode:
        reached = []
        monkeypatch.setattr(main, "run", lambda config, allow_config_change: reached.append(config))
        assert main.main(words) == 0
        return reached[0]

    return parse


def test_batch_script_syntax():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SLURM)], check=True)


def test_batch_script_starts_main(parse_main: Callable[[list[str]], CfgNode], tmp_path: Path):
    """Runs the script with stubs of Slurm's commands that record their arguments."""
    words = tmp_path / "words"
    for name, does in {"scontrol": "echo node7", "srun": f'printf "%s\\n" "$MASTER_ADDR" "$@" > {words}'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node[7-8]", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    result = subprocess.run(["bash", str(SLURM)], env=slurm, cwd=REPO_ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "ended with code 0" in result.stdout
    address, *command = words.read_text().splitlines()
    assert address == "node7"
    config = parse_main(command[command.index("main") + 1 :])
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)", SLURM.read_text(), re.M))
    processes = int(directives["nodes"]) * int(directives["ntasks-per-node"])
    assert config.DATA.BATCH_SIZE * processes == 1024


@pytest.mark.parametrize(("code", "tries"), [(0, 1), (2, 1), (3, 1), (4, 5), (137, 5)])
def test_batch_script_retries_what_may_succeed(code: int, tries: int, tmp_path: Path):
    for name, does in {"scontrol": "echo node7", "srun": f"echo . >> {tmp_path / 'tries'}; exit {code}"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node7", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    result = subprocess.run(["bash", str(SLURM)], env=slurm, cwd=REPO_ROOT, capture_output=True, text=True)
    assert result.returncode == code
    assert (tmp_path / "tries").read_text().count(".") == tries


def test_kubernetes_job_starts_main(parse_main: Callable[[list[str]], CfgNode]):
    job = yaml.safe_load(KUBERNETES.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    torchrun, script, *words = container["command"]
    assert (torchrun, script) == ("torchrun", "main.py")
    config = parse_main(words)
    assert config.DATA.BATCH_SIZE * worker["replicas"] * int(job["spec"]["nprocPerNode"]) == 1024
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert job["spec"]["elasticPolicy"]["minReplicas"] == worker["replicas"]


def test_manual_command_is_accepted(parse_main: Callable[[list[str]], CfgNode]):
    (line,) = re.findall(r"```bash\n(.*?)\n```", (REPO_ROOT / "docs" / "CLUSTER.md").read_text(), re.S)
    words = shlex.split(line)
    assert words[0].startswith("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=")
    parse_main(words[words.index("main.py") + 1 :])


@pytest.mark.slow
def test_two_hosts_one_killed():
    if reason := hosts.unsupported_reason():
        pytest.skip(reason)
    tally = hosts.run(count=1, seed=1)
    assert not tally.failures, "\n".join(tally.lines())
