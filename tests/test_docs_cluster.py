"""The templates for clusters are valid, and the commands in them are understood."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import main
from tests.faults import hosts
from utils.paths import REPO_ROOT

SLURM = REPO_ROOT / "docs" / "cluster" / "slurm.sbatch"
KUBERNETES = REPO_ROOT / "docs" / "cluster" / "pytorchjob.yaml"


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch):
    """Whether main.py takes these words, up to where data are looked at; returns the configuration."""
    monkeypatch.chdir(REPO_ROOT)

    def parse(words: list[str]):
        reached = []
        monkeypatch.setattr(main, "run", lambda config, allow_config_change: reached.append(config))
        assert main.main(words) == 0
        return reached[0]

    return parse


def test_the_batch_script_is_a_script():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SLURM)], check=True)


def test_the_batch_script_starts_what_main_understands(understood, tmp_path: Path):
    """Run for real, with commands in place of Slurm's that say what they were called with."""
    words = tmp_path / "words"
    for name, does in {"scontrol": "echo node7", "srun": f'printf "%s\\n" "$MASTER_ADDR" "$@" > {words}'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node[7-8]", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", str(SLURM)], env=slurm, cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ended with code 0" in done.stdout
    address, *command = words.read_text().splitlines()
    assert address == "node7"
    config = understood(command[command.index("main") + 1 :])
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)", SLURM.read_text(), re.M))
    processes = int(directives["nodes"]) * int(directives["ntasks-per-node"])
    assert config.DATA.BATCH_SIZE * processes == 1024


@pytest.mark.parametrize(("code", "tries"), [(0, 1), (2, 1), (3, 1), (4, 5), (137, 5)])
def test_the_batch_script_tries_again_what_may_succeed(code: int, tries: int, tmp_path: Path):
    for name, does in {"scontrol": "echo node7", "srun": f"echo . >> {tmp_path / 'tries'}; exit {code}"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node7", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", str(SLURM)], env=slurm, cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert (tmp_path / "tries").read_text().count(".") == tries


def test_the_kubernetes_job_starts_what_main_understands(understood):
    job = yaml.safe_load(KUBERNETES.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    torchrun, script, *words = container["command"]
    assert (torchrun, script) == ("torchrun", "main.py")
    config = understood(words)
    assert config.DATA.BATCH_SIZE * worker["replicas"] * int(job["spec"]["nprocPerNode"]) == 1024
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert job["spec"]["elasticPolicy"]["minReplicas"] == worker["replicas"]


def test_the_command_by_hand_is_understood(understood):
    (line,) = re.findall(r"```bash\n(.*?)\n```", (REPO_ROOT / "docs" / "CLUSTER.md").read_text(), re.S)
    words = shlex.split(line)
    assert shlex.split(line)[0].startswith("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=")
    understood(words[words.index("main.py") + 1 :])


@pytest.mark.slow
def test_two_hosts_of_which_one_is_killed():
    if reason := hosts.unsupported_reason():
        pytest.skip(reason)
    tally = hosts.run(count=1, seed=1)
    assert not tally.failures, "\n".join(tally.lines())
