"""generate() takes another way where accelerate is not installed: the answers are the same."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from families import inputs_for, make_checkpoint, resident

CHILD = """
import importlib.util, json, sys
sys.path[:] = [path for path in sys.path if path != sys.argv[2]] + [sys.argv[3]]
assert importlib.util.find_spec("accelerate") is None
import torch, bigmodel
model = bigmodel.load_sharded(sys.argv[1], {"": "disk"}, progress=False)
inputs = torch.load(sys.argv[4])
print(json.dumps(model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()))
assert bigmodel.stats_of(model).read_bytes > 0
"""


@pytest.mark.slow  # each imports everything in a process of its own
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_generate_where_accelerate_is_not_installed(family, tmp_path):
    import json

    site = Path(sysconfig.get_path("purelib"))
    others = tmp_path / "site-packages"
    others.mkdir()
    for entry in site.iterdir():
        if not entry.name.lower().startswith(("accelerate", "peft")):  # peft cannot be imported without it
            (others / entry.name).symlink_to(entry)
    folder = make_checkpoint(family, tmp_path / "model")
    inputs = {"input_ids": inputs_for(family)["input_ids"]}
    torch.save(inputs, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(site), str(others), str(tmp_path / "inputs.pt")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    expected = resident(folder).generate(**inputs, max_new_tokens=6, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()
