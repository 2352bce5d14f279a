"""Started by test_distributed.py: trains the cases that it is given in several processes, and saves what came of each.

    PYTHONPATH=. python tests/distributed_worker.py CASES FOLDER MODEL

CASES is a JSON file, {processes: {name: case}}; a case's weights are FOLDER/<processes>/<name>.pt, what each process
saw is in FOLDER/<processes>/<name>-<rank>.json.
"""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType
from small_trainer import make_rows
from torch import Tensor, nn

from tokentune.cli.arguments import parse_arguments
from tokentune.core.compat.fsdp import is_split, whole_state
from tokentune.data.collators import SeededRows
from tokentune.data.prompts import ensure_pad_token
from tokentune.models.builder import base_dtype, prepare_model
from tokentune.models.pretrained import load_config, load_tokenizer
from tokentune.settings.finetune import Arguments
from tokentune.training.build import build_trainer
from tokentune.training.result import save_result
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import build_training_arguments

ROWS, GLOBAL_BATCH, STEPS = 19, 12, 3  # two steps per epoch, of 12 and 7 rows
FSDP_2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
ZERO_2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "DS_ACCELERATOR": "cpu",
}
ZERO_3 = ZERO_2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
ENGINES = {"ddp": {}, "fsdp2": FSDP_2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "zero2": ZERO_2, "zero3": ZERO_3}


@dataclass
class Case:
    """A run of three steps on the tiny Llama.

    Attributes:
        words: flags, without the batch.
        fsdp: the engine is FSDP.
        accumulation: micro-batches per step.
        tied: the output head's weights are the embeddings'.
        dtype: of all weights.
        eval_rows: evaluated before and after.
        save: also save the result, into FOLDER/<processes>/<name>/.
        resume: a checkpoint of another case to go on from, below FOLDER.
        environment: further settings of the engine.
    """

    words: str
    fsdp: bool = False
    accumulation: int = 1
    tied: bool = False
    dtype: str = "float64"
    eval_rows: int = 0
    save: bool = False
    resume: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def train(case: Case, model_dir: str, folder: Path, name: str) -> tuple[SelectiveTrainer, list[list[int]]]:
    """Trains a case; returns the trainer and, of every micro-batch, the positions that were drawn."""
    words = f"--model_name_or_path {model_dir} --dataset_name_or_path rows.jsonl --model_save_path {folder} "
    words += "--report_to none --warmup_steps 0 --logging_steps 1 --learning_rate 1e-2 --num_epochs 2 "
    words += f"--global_batch_size {GLOBAL_BATCH} --gradient_accumulation_steps {case.accumulation} {case.words}"
    if case.eval_rows:
        words += " --eval_dataset_name_or_path rows.jsonl"
    arguments = parse_arguments(words.split())
    os.environ.update((FSDP_2 if case.fsdp else {}) | case.environment)
    settings = build_training_arguments(arguments, folder / name, max_steps=STEPS)
    trainer = build_trainer(
        build_model(case, arguments, model_dir),
        settings,
        SeededRows(make_rows(ROWS), arguments.optimization.seed),
        make_rows(case.eval_rows, seed=1) if case.eval_rows else None,
        *tokenizer_and(arguments, model_dir),
    )
    drawn: list[list[int]] = []
    own = trainer.data_collator.__class__.__call__

    class Noting(trainer.data_collator.__class__):
        def __call__(self, examples: Any) -> dict[str, Tensor]:
            batch = own(self, examples)
            drawn.extend(batch.get("selected_positions", torch.empty(0, 0)).tolist())
            return batch

    trainer.data_collator.__class__ = Noting
    trainer.train(resume_from_checkpoint=None if case.resume is None else str(folder.parent / case.resume))
    return trainer, drawn


def build_model(case: Case, arguments: Arguments, model_dir: str) -> nn.Module:
    torch.manual_seed(0)
    model = prepare_model(arguments, base_dtype(arguments, load_config(model_dir)))
    if case.tied:
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        core.config.tie_word_embeddings = True
        core.lm_head.weight = core.get_input_embeddings().weight
        core.all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    return model.to(getattr(torch, case.dtype))


def tokenizer_and(arguments: Arguments, model_dir: str) -> tuple[Any, Arguments]:
    tokenizer = load_tokenizer(model_dir)
    ensure_pad_token(tokenizer, load_config(model_dir).vocab_size)
    return tokenizer, arguments


def weights_of(trainer: SelectiveTrainer) -> dict[str, Tensor]:
    """All weights, whole, by their names; on processes other than the first of a split model nothing."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_split(model):
        return {name: tensor.clone() for name, tensor in whole_state(model).items()}
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # DeepSpeed ZeRO-3
        with import_module("deepspeed").zero.GatheredParameters(list(model.parameters())):
            return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def figures_of(trainer: SelectiveTrainer, drawn: list[list[int]]) -> dict[str, Any]:
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "gradient_norms": [float(e["grad_norm"]) for e in trainer.state.log_history if "loss" in e],
        "evaluations": [figures["loss"] for _, figures in trainer.figures.evaluations],
        "saved_for_backward_bytes": trainer.figures.saved_for_backward_bytes,
        "tokens": trainer.figures.tokens,
        "drawn": drawn,
        "split": is_split(trainer.model),
        "trained_bytes": sum(_local(p).nbytes for p in trainer.model.parameters() if p.requires_grad),
        "weight_bytes": sum(_local(p).nbytes for p in trainer.model.parameters()),
        "state_bytes": sum(
            _local(value).nbytes
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.ndim
        ),
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def let_engines_run_on_cpus() -> None:
    """accelerate has FSDP and DeepSpeed on accelerators alone; both, which it calls, run on CPUs (gloo) as well.

    DeepSpeed would first compile what it sends by, for minutes, where gloo does.
    """
    own = AcceleratorState.__init__

    def init(
        self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, deepspeed_plugin: Any = None, **kwargs: Any
    ) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if deepspeed_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, deepspeed_plugin
            for plugin in deepspeed_plugin.values() if isinstance(deepspeed_plugin, dict) else [deepspeed_plugin]:
                plugin.set_mixed_precision(self._mixed_precision)
                if plugin.zero_stage == 3:  # weights as small as a tiny model's would stay whole
                    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
                plugin.select(_from_accelerator_state=True)
            self._mixed_precision = "no"
        if fsdp_plugin is not None and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
            if not torch.distributed.is_initialized():  # of one process
                torch.distributed.init_process_group("gloo")
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init
    if find_spec("deepspeed"):
        # By name: `deepspeed.comm.torch` as an attribute is torch itself.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def run_process(rank: int, processes: int, port: int, cases: dict[str, dict], folder: Path, model_dir: str) -> None:
    """One process of several."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    let_engines_run_on_cpus()
    for name, settings in cases.items():
        case = Case(**settings)
        trainer, drawn = train(case, model_dir, folder, name)
        weights = weights_of(trainer)  # first: it splits what an evaluation left whole
        figures = figures_of(trainer, drawn)
        if rank == 0:
            torch.save(weights, folder / f"{name}.pt")
        if case.save:
            figures["facts"] = save_result(trainer, folder / name, getattr(torch, case.dtype))
        (folder / f"{name}-{rank}.json").write_text(json.dumps(figures))
        for variable in (*FSDP_2, *case.environment):
            os.environ.pop(variable, None)
    torch.distributed.destroy_process_group()


def main(cases_file: str, folder: str, model_dir: str) -> None:
    for processes, cases in json.loads(Path(cases_file).read_text()).items():
        below = Path(folder) / processes
        below.mkdir()
        # Forked: what takes longest is importing.
        words = (int(processes), free_port(), cases, below, model_dir)
        torch.multiprocessing.start_processes(run_process, words, nprocs=int(processes), start_method="fork")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def case_file(cases: dict[int, dict[str, Case]], path: Path) -> Path:
    path.write_text(json.dumps({n: {name: asdict(case) for name, case in of.items()} for n, of in cases.items()}))
    return path


if __name__ == "__main__":
    main(*sys.argv[1:])
