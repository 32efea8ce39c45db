"""Deliberate one-line faults in the core, each of which some test must catch: ``python tests/mutations.py``.

Every fault is made in a copy of the checkout, and the fast tests of the rules are run there until one fails. A fault
that no test notices is printed as SURVIVED, and the exit status is then 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fault_places import Places
from faults import FAULTS, Fault

IN_THIS_ORDER = """
going_on along losses_of_many_steps many_cotangents estimators binomial multi_step krylov optimizers own_optimizers clip
groups prox prox_at_rest muon averaging nested composed nested_optimizers implicit implicit_rule implicit_gradients
linear_solve linear_solve_tasks linear_solve_refusals es_jacobian es_jacobian_losses composition nesting solution
randomness from_torch from_torchopt half_precision bounds identities compare compare_notes compare_problems costs
every_rule over_tasks update_blocks step_by_step arguments odd_arguments unusable_tensors lift_spellings stationarity
checks compiled run_files damaged_data compiler_paths instruction_sets functional public_names modes gradient_batches
changes_before_backward changed_before_many_cotangents complex compiled_arguments random_threads warnings_of_estimates
precision_warning torch_errors derivatives_in_the_loss unrolled reports solver_advice error_fields lift_hyperparameters
lift_refusals lift_third_party recomputation hidden_state finite inner_products captures levels memory schedules
in_place vector_field games field_solutions field_constraints check_fields streams batches micro_batches attribution
pickles pickle_bombs mutated_pickles datamodeling datamodeling_file rank_correlation attribution_experiment claims
bounds_experiment sinusoid_experiment cost_experiment anil_experiment esj_experiment outer_loop few_shot_experiment
meta_transfer_experiment smoothness bad_inputs check_solve check_solve_precision compare_worth attention
attention_in_modules checkpointed_blocks transformers offload inner_data training sharded compiled_programs
kept_products tangents what_loops_read compiled_outer resume reproduce cli every_set mini_imagenet models episodes
yardsticks_experiment bounds_decay maml_experiment compiled_reads whole_programs memory_rates_experiment
hessian_free_experiment timing params_of_a_block captures_at_some_step unseen_reads draws compiled_implicit sparse
"""
NAMES = IN_THIS_ORDER.split()


def tested(copy: Path, names: list[str], *options: str) -> subprocess.CompletedProcess[str] | None:
    """What the tests of these names say in ``copy``; ``None``: there are none."""
    tests = [str(path) for name in names for path in sorted((copy / "tests").rglob(f"test_{name}.py"))]
    if not tests:
        return None
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "ci", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def survives(fault: Fault, copy: Path) -> bool:
    """Whether the tests pass in ``copy`` with the fault in place; the file is put right again."""
    places = Places(copy)
    found = places.found(fault)
    if len(found) != 1:
        raise SystemExit(f"{fault.what}: its text stands {len(found)} times in {fault.where}, expected once")
    file = found[0].file
    text = file.read_text(encoding="utf-8")
    file.write_text(places.planted(found[0], fault), encoding="utf-8")
    nearest = fault.tests  # the likeliest to notice go first, the slow ones among them too
    first = [name for name in NAMES if name.startswith(nearest)]
    rest = [name for name in NAMES if name not in first]
    done = tested(copy, first)
    if done is None or done.returncode == 0:
        done = tested(copy, rest, "-m", "not slow") or done
    assert done is not None
    file.write_text(text, encoding="utf-8")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failed:  # no test has failed: none has been run
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    print(f"{'SURVIVED' if done.returncode == 0 else 'caught  '}  {fault.what}", *failed[:1], sep="\n            ")
    return done.returncode == 0


def main() -> int:
    """Try every fault, or those whose description holds the first argument; survivors decide the exit status."""
    faults = [fault for fault in FAULTS if len(sys.argv) < 2 or sys.argv[1] in fault.what]
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
        shutil.copytree(root, copy, symlinks=True, ignore=skipped)
        survivors = [fault.what for fault in faults if survives(fault, copy)]
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
