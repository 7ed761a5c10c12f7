"""Training under the launcher: a killed process, a configuration that is given from outside, and the self-check."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from bigmodel.cli import app
from bigmodel.errors import InvalidArgumentError, MissingFilesError
from bigmodel.training import TrainingConfig
from bigmodel.training.checkup import ENGINES, check_engines
from bigmodel.training.configuration import Configuration, convert

COMMAND = [sys.executable, "-m", "bigmodel"]
LOOP = """
    import json, os, pathlib, signal, sys
    import torch
    from bigmodel.training import TrainingConfig, TrainingRun

    model, folder, kills = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:] == ["kills"]

    class Tokens(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            ids = torch.arange(16) * (index + 2) % 97
            return {"input_ids": ids, "labels": ids, "index": torch.tensor(index)}

    run = TrainingRun(TrainingConfig(strategy="fsdp", precision="fp32", global_batch_size=4, micro_batch_size=1, seed=3))
    model, optimizer, loader = run.prepare(
        model=model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), data=Tokens(), progress=False)
    run.load_last(folder / "checkpoints")
    seen = []
    for batch in loader:
        seen.append(batch.pop("index").item())
        with run.accumulate():
            run.backward(run.loss(model(**batch), batch))
            run.step()
        if run.sync_gradients:
            record = run.last_step
            everybody = sorted(run.processes.gathered(list(seen)))
            seen.clear()
            if run.is_main_process:
                with open(folder / "steps.jsonl", "a") as file:
                    file.write(json.dumps([record.step, record.loss, sorted(sum(everybody, []))]) + "\\n")
            if kills and record.step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.processes.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            run.save(folder / "checkpoints" / str(record.step), keep=2)
"""


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "launch", "-n", "2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.slow  # six launched processes
def test_a_killed_process_goes_on_from_the_last_checkpoint(folder, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(LOOP))
    steps = {}
    for name, options in (("whole", ()), ("killed", ("--restarts", "1"))):
        (tmp_path / name).mkdir()
        done = launched(*options, script, folder, tmp_path / name, *(["kills"] if options else []))
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "steps.jsonl").read_text().splitlines()]
        steps[name] = {step: (loss, samples) for step, loss, samples in lines}
        numbers = [step for step, _, _ in lines]
        assert numbers == ([1, 2, 3, 4, 5, 6] if not options else [1, 2, 3, 3, 4, 5, 6])
    assert steps["killed"] == steps["whole"]
    assert "rank 1 was killed by signal 9 (SIGKILL)" in done.stderr or "rank 1 ended without a word" in done.stderr
    assert "starting again, 1 of 1" in done.stderr


@pytest.mark.slow  # three launched processes
def test_a_configuration_is_given_from_outside(folder, tmp_path):
    file = tmp_path / "two.yaml"
    made = Configuration(
        launch={"num_processes": 2},
        training={"strategy": "zero1", "precision": "fp32", "engine_options": {}, "seed": 7},
    )
    file.write_text(made.written())
    assert Configuration.read(file) == made
    assert TrainingConfig.read(file) == TrainingConfig(**made.training)
    assert TrainingConfig.read(file, grad_clip=0.5).grad_clip == 0.5
    script = tmp_path / "show.py"
    script.write_text(
        "from bigmodel.training import TrainingRun\n"
        "run = TrainingRun()\n"
        "print(run.config.strategy, run.config.seed, run.processes.size, flush=True)\n"
    )
    command = [*COMMAND, "launch", "--config", file]
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=120, check=False)
    assert sorted(done.stdout.splitlines()) == ["[rank 1] zero1 7 2", "zero1 7 2"], done.stderr
    # What is given on the command line counts more.
    one = subprocess.run([*command, "-n", "1", script], capture_output=True, text=True, timeout=120, check=False)
    assert one.stdout == "zero1 7 1\n", one.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("launch: {num_proceses: 2}", "'num_proceses' under launch, which is no setting. Write num_processes"),
        ("training: {strategy: fastest}", "strategy is 'fastest'"),
        ("training: 3", "training in .* is 3. It holds settings by name"),
        ("training: {}\nlaunching: {}", "has 'launching'. Its sections are: launch, training"),
        ("launch: {num_restarts: -1}", "num_restarts is -1"),
        ("launch: [", "is no yaml file"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(tmp_path, text, told):
    file = tmp_path / "bigmodel.yaml"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=told):
        Configuration.read(file)
    done = CliRunner().invoke(app, ["config", "--check", str(file)])
    assert done.exit_code == 2
    with pytest.raises(MissingFilesError):
        Configuration.read(tmp_path / "none.yaml")


def test_every_field_of_a_configuration_has_its_line():
    text = Configuration().written()
    for name in (*TrainingConfig.__dataclass_fields__, "num_processes", "endpoint"):
        assert f"\n  # {name}: " in text
    assert Configuration.of({}, "it") == Configuration()


ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: bf16
num_machines: 2
num_processes: 16
main_process_ip: node0
main_process_port: 29501
gradient_accumulation_steps: 1
fsdp_config:
  fsdp_version: 2
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_offload_params: true
"""


def test_configurations_of_others_are_converted_and_what_changed_is_told(tmp_path):
    source, out = tmp_path / "accelerate.yaml", tmp_path / "ours.yaml"
    source.write_text(ACCELERATE)
    found = convert(source, 1)
    assert found.kind == "Accelerate"
    assert found.configuration.launch == {"num_nodes": 2, "num_processes": 8, "endpoint": "node0:29501"}
    said = {path: decided for path, _, decided in found.said}
    assert said["mixed_precision"] == {"precision": "bf16"}
    assert said["fsdp_config.fsdp_sharding_strategy"] == {"reshard_after_forward": False}
    assert said["fsdp_config.fsdp_offload_params"] == {"offload_params": "cpu", "offload_optimizer": "cpu"}
    assert said["fsdp_config.fsdp_version"] == {}
    assert said["num_processes"] == {"num_processes": 8}
    done = CliRunner().invoke(app, ["config", "--check", str(source), "--output", str(out)])
    assert done.exit_code == 0, done.stderr
    assert "is Accelerate's, and means:" in done.stdout
    assert Configuration.read(out) == found.configuration
    again = CliRunner().invoke(app, ["config", "--check", str(source), "--output", str(out)])
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    right = CliRunner().invoke(app, ["config", "--check", str(out)])
    assert f"{out} is right" in right.stdout
    assert 'training.strategy: "fsdp"' in right.stdout

    deepspeed = tmp_path / "ds.json"
    batch = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    zero = {"stage": 3, "overlap_comm": False}
    deepspeed.write_text(json.dumps({**batch, "zero_optimization": zero, "bf16": {"enabled": True}}))
    read = convert(deepspeed, 4)
    assert read.kind == "DeepSpeed"
    assert read.configuration.training["global_batch_size"] == 24
    by_path = {path: decided for path, _, decided in read.said}
    assert by_path["bf16.enabled"] == {"precision": "bf16"}
    assert by_path["zero_optimization.overlap_comm"] == {
        "engine_options": {"zero_optimization": {"overlap_comm": False}}
    }
    assert read.configuration.config() == TrainingConfig.read(deepspeed, num_processes=4)


def test_questions_are_answered_by_what_is_detected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = CliRunner().invoke(app, ["config", "--yes"])
    assert taken.exit_code == 0, taken.stderr
    first = Configuration.read("bigmodel.yaml")
    assert first.launch["num_processes"] >= 1
    assert first.training["strategy"] == "auto"
    answers = "2\nnode7\n3\n1\nfast\nfsdp\nfp32\n64\n0\n"
    asked = CliRunner().invoke(app, ["config", "--output", "other.yaml"], input=answers)
    assert asked.exit_code == 0, asked.stderr
    assert "'fast' is none of them" in asked.stderr
    other = Configuration.read("other.yaml")
    assert other.launch == {"num_nodes": 2, "endpoint": "node7", "num_processes": 3, "num_restarts": 1}
    assert other.training == {"strategy": "fsdp", "precision": "fp32", "global_batch_size": 64}
    assert CliRunner().invoke(app, ["config", "--yes"]).exit_code == 2  # it is there already
    assert CliRunner().invoke(app, ["config", "--yes", "--force"]).exit_code == 0


@pytest.mark.slow  # six launched processes
def test_engines_are_tried_and_what_fails_is_told(monkeypatch):
    said = []
    (single, ddp) = check_engines(["ddp"], num_processes=2, tell=said.append, progress=False)
    assert single.told.startswith("ok: loss 5.")
    assert re.fullmatch(r"ok: loss [\d.]+ to [\d.]+ in 4 steps, 2 processes, \d+ s, within .* of one process", ddp.told)
    assert not said
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    (_, broken) = check_engines(["ddp"], num_processes=2, tell=said.append, progress=False)
    assert broken.is_failed
    assert broken.told.startswith("FAILED: rank ")
    assert any("Traceback" in each for each in said)
    with pytest.raises(InvalidArgumentError, match="There is no engine 'ddq'"):
        list(check_engines(["ddq"], tell=said.append))


@pytest.mark.long  # eight engines in processes of their own
def test_every_engine_trains_as_one_process():
    done = CliRunner().invoke(app, ["test", "-n", "2"])
    assert done.exit_code == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(ENGINES)
    assert all(": ok: " in re.sub(" +", " ", line) for line in lines)
