"""How a policy is asked to solve a problem: what its family is used to, told by its chat template and never by a name or path.

Knows texts only; models/tokenizer.py makes ids of them.
"""

from dataclasses import dataclass

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."

# Meta's, for its MATH evaluations. answers.py knows the closing sentence, policy.py the headers.
STEP_BY_STEP = r"""Solve the following math problem efficiently and clearly:

- For simple problems (2 steps or fewer):
Provide a concise solution with minimal explanation.

- For complex problems (3 steps or more):
Use this step-by-step format:

## Step 1: [Concise description]
[Brief explanation and calculations]

## Step 2: [Concise description]
[Brief explanation and calculations]

...

Regardless of the approach, always conclude with:

Therefore, the final answer is: $\boxed{answer}$. I hope it is correct.

Where [answer] is just the final number or expression that solves the problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """`signs`: what every chat template of the family writes; `system`: its system message, "" for none; `ending`: what follows
    the problem in the user's message."""

    signs: tuple[str, ...] = ()
    system: str = ""
    ending: str = ""


# The first whose signs a template has. DeepSeek-R1 asks for no system message; its distilled models keep their base's config.
PROMPTS = {
    "deepseek-r1": Prompt(signs=("<\uff5cAssistant\uff5c>", "</think>"), ending=f"\n{BOXED}"),
    "llama-3": Prompt(signs=("<|start_header_id|>",), system=STEP_BY_STEP),
    "other": Prompt(system=BOXED),
}


def recognise(chat_template: str | None) -> str:
    """The name in PROMPTS of the family that a chat template is of; "other" where there is none."""
    return next(name for name, prompt in PROMPTS.items() if all(sign in (chat_template or "") for sign in prompt.signs))


def messages(problem: str, chat_template: str | None, system: str | None = None) -> tuple[str, str]:
    """(system message, user's message) for a problem; a `system` that is given stands instead of all that the family would add."""
    if system is not None:
        return system, problem
    prompt = PROMPTS[recognise(chat_template)]
    return prompt.system, problem + prompt.ending
