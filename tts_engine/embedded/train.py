"""Trains the embedded policies and PRMs from nothing, with transformers' own modules, on the CPU."""

import copy
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

import torch
from safetensors.torch import save_file

from ..errors import EngineError
from ..models.decoder import rotary_frequencies
from ..models.spec import DecoderSpec
from ..models.tokenizer import load_tokenizer
from ..prm.families import FAMILIES
from ..prm.spec import TokenPair
from ..tasks.problems import load_task
from . import MODELS
from .check import publish
from .corpus import (
    FIRST_ERROR,
    GOOD,
    IGNORE,
    LATER_ERROR,
    RIGHT_DIGIT,
    WRONG_DIGIT,
    Trajectory,
    arithmetic_drill,
    batches,
    checked_rows,
    corrupted_gold,
    labelled,
    labelled_rows,
    solved_rows,
    training_programs,
)
from .recipe import (
    ADDED_LAYERS,
    BATCH_TOKENS,
    POLICIES,
    PRMS,
    SAMPLED_DRAWS,
    SAMPLED_POLICIES,
    SAMPLED_PROGRAMS,
    SAMPLED_TEMPERATURE,
    STUDY_CHECKPOINTS,
    STUDY_POLICIES,
    STUDY_PRMS,
    PolicyRecipe,
    PRMRecipe,
)
from .tokenizer import build_tokenizer, save_tokenizer

Log = Callable[[str], None]

# Each class weighs the same in every batch, however rare; what follows a first error teaches little.
CLASS_WEIGHTS = {FIRST_ERROR: 1.0, GOOD: 1.0, LATER_ERROR: 0.25, WRONG_DIGIT: 1.0, RIGHT_DIGIT: 1.0}
# The added layers of a PRM write this much louder than a fresh layer would: the stream that they join has grown to fifty times
# an embedding's size. And their first head looks one token back this sharply, in logits.
LOUDNESS, SHARPNESS = 8.0, 60.0


def qwen2_config(recipe: PolicyRecipe, vocab_size: int):
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=512,
        # 0.02, made for wide models, leaves narrow ones on a plateau for millions of tokens
        initializer_range=0.64 * recipe.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def fit(step_loss, parameters, stream, *, total_tokens: int, learning_rate: float, name: str, log: Log,
        spending: Callable[[int], None] = lambda tokens: None) -> None:  # fmt: skip
    """AdamW with warm-up and a cosine to a tenth, clipped at 1; `step_loss(ids, targets)` -> scalar. `spending` is told what every
    step took."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warmup = 0.02 * total_tokens
    spent, steps, started, recent = 0, 0, time.monotonic(), []
    for ids, targets, real in stream:
        progress = min(1.0, spent / total_tokens)
        rate = learning_rate * min(1.0, (spent + BATCH_TOKENS) / warmup) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(ids, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        spent, steps = spent + real, steps + 1
        spending(real)
        recent.append(loss.item())
        if steps % 100 == 0:
            seconds = time.monotonic() - started
            log(f"{name}: {spent / 1e6:.2f} of {total_tokens / 1e6:.1f} M tokens, loss {sum(recent) / len(recent):.4f}, "
                f"{spent / seconds:,.0f} tokens/s, {seconds:.0f} s")  # fmt: skip
            recent.clear()


def train_policy(recipe: PolicyRecipe, directory: Path, log: Log = print) -> None:
    """Train one policy and save it as a Hugging Face directory of bfloat16 weights."""
    from transformers import Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(qwen2_config(recipe, tokenizer.get_vocab_size()))

    def step_loss(ids, targets):
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    for leg, (tokens, learning_rate) in enumerate(recipe.legs):
        seed = recipe.seed + 1000 * leg
        rows = (checked_rows if recipe.checked else solved_rows)(tokenizer, seed)
        stream = batches(rows, batch_tokens=BATCH_TOKENS, total_tokens=tokens, seed=seed)
        fit(step_loss, model.parameters(), stream, total_tokens=tokens, learning_rate=learning_rate, name=recipe.name, log=log)
        round_weights(model)
    model.bfloat16()
    model.save_pretrained(directory)
    save_tokenizer(directory)


def round_weights(model: torch.nn.Module) -> None:
    """Every parameter to the nearest bfloat16, which is what is saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def train_prm(recipe: PRMRecipe, start: Path, early: Iterable[Trajectory], last: Iterable[Trajectory], directory: Path,
              log: Log = print, checkpoints: Mapping[int, Path] = MappingProxyType({})) -> None:  # fmt: skip
    """Train one PRM from the policy in `start`, its last leg on `last`, and save it in its family's form. checkpoints: where it is
    saved as well, by the tokens after which.

    Beside the steps' scores it learns, in all legs but the last and through a head that is not kept, which characters of each
    result are right: a score alone is too little to learn arithmetic from.
    """
    from transformers import Qwen2ForCausalLM

    save_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    spec = FAMILIES[recipe.family].bind(tokenizer)
    torch.manual_seed(recipe.seed)
    policy = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    known = list(policy.parameters())
    model = with_added_layers(policy, tokenizer)
    width = model.config.hidden_size
    score = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
    digit = torch.nn.Linear(width, 2)
    pair = [spec.readout.minus, spec.readout.plus] if isinstance(spec.readout, TokenPair) else []
    parameters = [*model.parameters(), *digit.parameters(), *(() if pair else score.parameters())]

    def loss_of_scores(hidden, targets):
        of_step = targets.ge(FIRST_ERROR) & targets.le(LATER_ERROR)
        steps = hidden[of_step]
        logits = steps @ model.model.embed_tokens.weight[pair].T if pair else score(steps)
        return balanced_loss(logits, targets[of_step])

    def loss_of_last(ids, targets):
        return loss_of_scores(model.model(input_ids=ids, use_cache=False).last_hidden_state, targets)

    def loss_of_early(ids, targets):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        of_digit = targets.ge(WRONG_DIGIT)
        return loss_of_scores(hidden, targets) + balanced_loss(digit(hidden[of_digit]), targets[of_digit])

    equals = tokenizer.convert_tokens_to_ids("=")
    waiting, spent = dict(checkpoints), 0

    def spending(tokens: int) -> None:
        nonlocal spent
        spent += tokens
        for at in [at for at in waiting if at <= spent]:
            place = waiting.pop(at)
            place.mkdir(parents=True, exist_ok=True)
            save_tokenizer(place)
            save_prm(recipe, copy.deepcopy(model), None if pair else copy.deepcopy(score), place)
            log(f"{recipe.name}: saved after {spent / 1e6:.2f} M tokens as {place.name}")

    early_rows, last_rows = (labelled_rows(spec, equals, trajectories) for trajectories in (early, last))
    for leg, (tokens, learning_rate) in enumerate(recipe.legs):
        for parameter in known:
            parameter.requires_grad_(leg > 0)
        rows, loss = (early_rows, loss_of_early) if leg < len(recipe.legs) - 1 else (last_rows, loss_of_last)
        stream = batches(rows, batch_tokens=BATCH_TOKENS, total_tokens=tokens, seed=recipe.seed + 1000 * leg)
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        fit(loss, learning, stream, total_tokens=tokens, learning_rate=learning_rate, name=recipe.name, log=log,
            spending=spending)  # fmt: skip
        if leg >= len(recipe.legs) - 2:  # the last leg starts from what could be saved, and ends with it
            round_weights(model)
            round_weights(score)
    save_prm(recipe, model, None if pair else score, directory)


def save_prm(recipe: PRMRecipe, model, score, directory: Path) -> None:
    """Write the PRM as bfloat16, its head `score` if its family has one; `model` is bfloat16 from then on."""
    model.bfloat16()
    if score is not None:
        tensors = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
        tensors |= {f"score.{name}": tensor.to(torch.bfloat16) for name, tensor in score.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
        model.config.architectures = ["Qwen2ForProcessRewardModel"]
        model.config.save_pretrained(directory)
    else:
        model.config.prm_family = recipe.family  # the tensors alone look like any causal LM
        model.save_pretrained(directory)


def balanced_loss(logits, kinds):
    """logits [N, 2] of (bad, good) against kinds [N]: the mean loss of each kind that is there, weighted by CLASS_WEIGHTS."""
    good = (kinds == GOOD) | (kinds == RIGHT_DIGIT)
    losses = torch.nn.functional.cross_entropy(logits, good.long(), reduction="none")
    return sum(losses[kinds == kind].mean() * weight for kind, weight in CLASS_WEIGHTS.items() if (kinds == kind).any())


def with_added_layers(policy, tokenizer):
    """The policy with ADDED_LAYERS layers on top; the layers below share its parameters.

    To check a result is to set what stands there against what belongs there. A policy knows the latter, but one token earlier
    and in its last layer. So the first head of the first added layer starts as a look one token back, at the logits that the
    policy gives digits, sign and line end there; left to find that look by itself, training takes many times as long.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = policy.config.to_dict()
    num_layers = sizes["num_hidden_layers"] + ADDED_LAYERS
    model = Qwen2ForCausalLM(Qwen2Config(**sizes | {"num_hidden_layers": num_layers, "layer_types": None}))
    added = model.model.layers[-ADDED_LAYERS:]
    model.model.embed_tokens = policy.model.embed_tokens
    for i, layer in enumerate(policy.model.layers):
        model.model.layers[i] = layer
    model.tie_weights()
    model.model.norm.load_state_dict(policy.model.norm.state_dict())
    spec = DecoderSpec.from_hf(sizes | {"architectures": ["Qwen2ForCausalLM"]}, "the policy's config")
    width, group = spec.head_dim, spec.num_heads // spec.num_kv_heads
    frequencies = rotary_frequencies(spec)
    here = torch.cat([torch.ones(width // 2), torch.zeros(width // 2)])
    one_back = torch.cat([frequencies.cos(), -frequencies.sin()])  # `here`, turned by one position
    loudness = (SHARPNESS * width**0.5 / (width // 2)) ** 0.5
    read = tokenizer.convert_tokens_to_ids([*"0123456789-", "\n"])
    attention = added[0].self_attn
    with torch.no_grad():
        added[0].input_layernorm.load_state_dict(policy.model.norm.state_dict())
        attention.k_proj.weight[:width], attention.k_proj.bias[:width] = 0, loudness * here
        attention.q_proj.weight[: group * width] = 0
        attention.q_proj.bias[: group * width] = loudness * torch.cat([one_back, *[here] * (group - 1)])
        attention.v_proj.weight[: len(read)] = 0.3 * policy.model.embed_tokens.weight[read]
        for layer in added:
            layer.self_attn.o_proj.weight *= LOUDNESS
            layer.mlp.down_proj.weight *= LOUDNESS
    return model


@torch.inference_mode()
def sample_trajectories(policy: Path, file: Path, *, seed: int, log: Log = print) -> None:
    """Write what `policy` answers to fresh training programs, with labels, as JSONL (one trajectory a line)."""
    from transformers import Qwen2ForCausalLM

    tokenizer = load_tokenizer(policy)
    tokenizer.padding_side = "left"
    model = Qwen2ForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    chosen = sorted(itertools.islice(training_programs(seed), SAMPLED_PROGRAMS), key=lambda program: len(program.text))
    lines, started = [], time.monotonic()
    for first in range(0, SAMPLED_PROGRAMS, 128):
        group = chosen[first : first + 128]
        inputs = tokenizer([program.text + "\n" for program in group], return_tensors="pt", padding=True)
        longest = inputs["input_ids"].shape[1]
        outputs = model.generate(**inputs, do_sample=True, temperature=SAMPLED_TEMPERATURE, top_k=0,
                                 num_return_sequences=SAMPLED_DRAWS, max_new_tokens=160)  # fmt: skip
        for i, text in enumerate(tokenizer.batch_decode(outputs[:, longest:], skip_special_tokens=True)):
            steps = [step for step in text.split("\n\n") if step.strip()]
            trajectory = labelled(group[i // SAMPLED_DRAWS], steps)
            lines.append(json.dumps([trajectory.problem, trajectory.steps, trajectory.kinds]))
        if first // 128 % 10 == 0:
            log(f"{file.stem}: {len(lines)} trajectories, {time.monotonic() - started:.0f} s")
    random.Random(seed).shuffle(lines)
    partial = file.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.rename(file)


def sampled(files: list[Path]) -> Iterator[Trajectory]:
    """The trajectories of several sample files, in turn, over and over."""
    columns = [file.read_text().splitlines() for file in files]
    lines = [line for row in itertools.zip_longest(*columns) for line in row if line is not None]
    for problem, steps, kinds in map(json.loads, itertools.cycle(lines)):
        yield Trajectory(problem, tuple(steps), tuple(kinds))


def train_all(out: Path, work: Path, log: Log = print) -> None:
    """Remake every model that `out` lacks and measure them; logs and samples go to `work`.

    Two single-threaded processes are the best use of two cores: small matrices gain little from a second thread.
    """
    lanes = (["policy-l"], ["policy-m", "policy-s", "prm-good", "prm-poor"])
    _run_lanes([[out / name for name in names] for names in lanes], work, out)
    publish(out, load_task("embedded", "calibration"), log)
    log(f"the embedded models are in {out}")


def train_study(out: Path, work: Path, log: Log = print) -> None:
    """Make the models that only the study takes, from those that ship: a policy that checks its results, a small PRM, and a shipped
    PRM as it was after each of STUDY_CHECKPOINTS. That PRM is made once more for it and stays in `work`.

    Raises EngineError where it is not to the last bit the one that ships, as may be with another version of torch.
    """
    name, tokens = STUDY_CHECKPOINTS
    lanes = [[work / name, *(out / prm for prm in STUDY_PRMS)], [out / policy for policy in STUDY_POLICIES]]
    _run_lanes(lanes, work, MODELS, {name: {at: out / f"{name}-{at / 1e6:g}M" for at in tokens}})
    made, ships = ((directory / name / "model.safetensors").read_bytes() for directory in (work, MODELS))
    if made != ships:
        raise EngineError(f"{work / name} is not the {name} that ships, so its checkpoints in {out} are of another training")
    log(f"the study's models are in {out}")


Checkpoints = Mapping[str, Mapping[int, Path]]  # of a PRM, by its name: where it is saved after how many tokens


def _run_lanes(lanes: Sequence[Sequence[Path]], work: Path, starts: Path, checkpoints: Checkpoints | None = None) -> None:
    """Make the models that are missing, a process a lane. starts: where the policies are that a PRM begins with or learns from."""
    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(len(lanes), mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_run_lane, directories, work, starts, checkpoints or {}) for directories in lanes]:
            done.result()


def _run_lane(directories: Sequence[Path], work: Path, starts: Path, checkpoints: Checkpoints) -> None:
    """Make the models of one lane in turn; each appears in its directory when it is whole."""
    torch.set_num_threads(1)
    for directory in directories:
        if directory.exists():
            continue
        name, partial = directory.name, work / f"{directory.name}.partial"
        partial.mkdir(exist_ok=True)
        with open(work / f"{name}.log", "a") as file:

            def log(line: str, file: TextIO = file) -> None:
                print(line, file=file, flush=True)

            policy, prm = (POLICIES | STUDY_POLICIES).get(name), (PRMS | STUDY_PRMS).get(name)
            if policy:
                train_policy(policy, partial, log)
            elif prm:
                _make_prm(prm, partial, starts, work, log, checkpoints.get(name, {}))
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(directory)


def _make_prm(recipe: PRMRecipe, directory: Path, starts: Path, work: Path, log: Log, checkpoints: Mapping[int, Path]) -> None:
    early: Iterable[Trajectory]
    last: Iterable[Trajectory]
    if recipe.trained_on == "corrupted gold":
        early, last = corrupted_gold(recipe.seed), corrupted_gold(recipe.seed + 1)
    else:
        files = [work / f"{policy}.jsonl" for policy in SAMPLED_POLICIES]
        for number, (policy, file) in enumerate(zip(SAMPLED_POLICIES, files, strict=True)):
            if not file.exists():
                sample_trajectories(starts / policy, file, seed=100 + number, log=log)
        early = itertools.chain.from_iterable(zip(sampled(files), arithmetic_drill(recipe.seed), strict=False))
        last = sampled(files)
    train_prm(recipe, starts / recipe.start, early, last, directory, log, checkpoints)
