"""The demo's searches against the same searches in transformers: equal draws, equal answers, in one run.

All contenders draw with the package's random numbers, so in float32 they write the same tokens. Ours is raced as the demo runs it,
problems side by side, and one problem at a time as a script would.
"""

import pytest
import torch

from tts_engine.attention import make_backend
from tts_engine.config import EngineConfig
from tts_engine.draws import Limits
from tts_engine.embedded import BLOCK_SIZE, model_path
from tts_engine.engine import Engine, make_scorer
from tts_engine.models.weights import Checkpoint, load_decoder
from tts_engine.runner import ModelRunner
from tts_engine.search import make_method
from tts_engine.search.voting import all_aggregates
from tts_engine.tasks.answers import extract_answer
from tts_engine.tasks.problems import load_task

from .baselines.lockstep import Rows, Task, search
from .baselines.sharing_blind import RereadingPRM, SharingBlindPolicy
from .baselines.transformers_loop import TransformersPolicy, TransformersPRM, language_model

pytestmark = pytest.mark.timeout(0)
POLICY, PRM = "policy-s", "prm-good"
PROBLEMS = 20
ALIKE = 0.9  # of steps and of answers: what float32 leaves open, another arithmetic may decide otherwise, and all that follows


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained(model_path(POLICY), model_path(PRM), block_size=BLOCK_SIZE) as engine:
        yield engine


@pytest.fixture(scope="module")
def loops():
    """By name, who writes and who reads."""
    policy, prm = (Checkpoint(model_path(name)) for name in (POLICY, PRM))
    decoders = [load_decoder(checkpoint) for checkpoint in (policy, prm)]
    runners = [ModelRunner(decoder, make_backend("native"), num_blocks=4096, block_size=BLOCK_SIZE) for decoder in decoders]
    scorer = make_scorer(runners[1], prm, None)
    models = [language_model(checkpoint, torch.float32) for checkpoint in (policy, prm)]
    return {
        "sharing-blind, PRM re-read": (SharingBlindPolicy(runners[0]), RereadingPRM(runners[1], scorer)),
        "transformers loop": (TransformersPolicy(models[0], Rows.sample), TransformersPRM(models[1], scorer.spec, prm)),
    }


def tasks_of(engine, results):
    """What the engine has searched, for a loop."""
    config, spec = EngineConfig(), engine.policy.runner.decoder.spec
    scorer = engine.scorer
    for result in results:
        method = result.method
        marks = len(scorer.spec.step("", False)) * method.max_steps
        room = scorer.runner.decoder.spec.max_positions - len(scorer.spec.opening(result.problem.problem)) - marks
        limits = Limits(max_step_tokens=config.max_step_tokens, max_tokens=min(config.max_tokens, room),
                        max_positions=spec.max_positions)  # fmt: skip
        prompt = list(result.nodes[0].path[0].tokens)
        yield Task(method=method, problem=result.problem, prompt=prompt, rule=engine.policy.rule, limits=limits, seed=result.seed)


@pytest.mark.parametrize("name", ["best_of_n", "beam"])
def test_demo(race, engine, loops, name):
    method, problems = make_method(name, n=16), load_task("embedded", "test", PROBLEMS)

    def side_by_side():
        engine.forget()
        return engine.search(problems, method)

    def one_by_one():
        engine.forget()
        return [engine.search(problem, method)[0] for problem in problems]

    results = side_by_side()
    tasks = list(tasks_of(engine, results))
    drawn = {(result.problem.id, node.identity): node.tokens for result in results for node in result.nodes}

    def loop(policy, prm):
        def run():
            answers, steps = [], []
            for task in tasks:
                branches, spent = search(task, policy, prm)
                steps += [drawn.get((task.problem.id, node.identity)) == node.tokens for node in spent.nodes]
                found = [extract_answer(branch.solution) for branch in branches]
                answers.append(all_aggregates(found, [branch.scores for branch in branches])["last_vote"])
            assert sum(steps) >= ALIKE * max(len(steps), len(drawn)), f"{sum(steps)} of {len(drawn)} steps are ours"
            same = sum(answer == result.answer for answer, result in zip(answers, results, strict=True))
            assert same >= ALIKE * len(results), f"{same} of {len(results)} answers are ours"

        return run

    contenders = {"ours": side_by_side, "ours, one problem at a time": one_by_one}
    contenders |= {name: loop(policy, prm) for name, (policy, prm) in loops.items()}
    race(f"{POLICY} + {PRM}, {name} n=16, {PROBLEMS} problems", contenders, slow=True,
         columns=lambda _, seconds: {"problems/s": PROBLEMS / seconds})  # fmt: skip
