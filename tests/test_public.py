"""The public signatures, frozen: what is written here does not change without a deprecation."""

import inspect

import bigmodel

SIGNATURES = {
    "load_sharded": "(path, device_map='auto', max_memory=None, dtype='auto', workload=None, allow_cpu_compute=False, "
    "offload_folder=None, model=None, no_split_module_classes=None, revision=None, subfolder=None, variant=None, "
    "key_mapping=None, strict=True, trust_remote_code=False, progress=None)",
    "make_plan": "(path_or_model, machine=None, workload=None, max_memory=None, device_map='auto', "
    "allow_cpu_compute=False, *, dtype='auto', offload_folder=None, model=None, no_split_module_classes=None, "
    "revision=None, subfolder=None, variant=None, key_mapping=None, strict=True, trust_remote_code=False)",
    "materialize": "(model, device='cpu')",
    "plan_of": "(model)",
    "save": "(model, folder, max_shard_size='5GB', *, progress=None)",
    "stats_of": "(model)",
    "unload": "(model)",
    "Workload": "(*, batch_size=1, prompt_tokens=512, new_tokens=128, trains=False)",
    "Machine.probe": "(folder=None, *, root='/')",
    "Machine.calibrate": "(folder=None, *, progress=None)",
    "Machine.load": "(file)",
    "Machine.to_json": "(self)",
    "Plan.explain": "(self)",
    "Plan.from_device_map": "(device_map, path_or_model, machine=None, workload=None)",
    "Plan.to_json": "(self)",
    "Plan.from_json": "(text)",
}
FIELDS = {
    "Placement": ["unit", "home", "run_on", "prefill_on", "weight_bytes", "parameters"],
    "Estimate": [
        "peak_bytes", "baseline_bytes", "load_s", "ttft_s", "time_per_token_s", "tokens_per_s", "binds",
        "phase_peak_bytes", "pass_s", "least_s", "bytes_per_s", "train_step_s",
    ],
    "StreamStats": [
        "num_passes", "pass_s", "stall_s", "num_reads", "read_bytes", "num_hits", "num_misses", "resident_bytes",
        "mapped_bytes", "slot_bytes", "copied_bytes", "steady", "plan",
    ],
}  # fmt: skip


def test_signatures_are_what_they_were():
    for name, expected in SIGNATURES.items():
        found = bigmodel
        for part in name.split("."):
            found = getattr(found, part)
        signature = inspect.signature(found)
        plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
        assert str(inspect.Signature(plain)) == expected, name


def test_fields_are_what_they_were():
    for name, expected in FIELDS.items():
        assert list(inspect.signature(getattr(bigmodel, name)).parameters) == expected, name


def test_every_public_name_is_frozen_here():
    frozen = {name.split(".")[0] for name in SIGNATURES} | FIELDS.keys()
    assert frozen == set(bigmodel.__all__) - {"errors"}
