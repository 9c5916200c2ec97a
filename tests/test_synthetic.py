"""The synthetic conversations: the same everywhere, right in every line, and honest about what is held out."""

import hashlib
import itertools
import json
import re

import pytest

from gptoss_jax.text import harmony
from gptoss_jax.training import synthetic
from gptoss_jax.training.synthetic import arithmetic
from gptoss_jax.training.synthetic.problems import FAMILIES

EFFORTS = ("low", "medium", "high")
EQUATIONS = re.compile(r"(\d+(?:[+*/-]\d+)+(?:=-?\d+(?:[+*/-]\d+)*)+)(?: remainder (\d+)|, left (\d+))?")  # 4*6+4=24+4=28


def draw(count, split="train", **choice):
    return [synthetic.conversation(7, index, split, **choice) for index in range(count)]


def text(message):
    return "".join(item["text"] for item in message["content"])


def turn(sample):
    return sample.messages[sample.prompt_length :]


def test_a_conversation_is_a_pure_function_of_seed_index_and_split():
    assert draw(50) == draw(50)
    assert len({str(sample.messages) for sample in draw(200)}) == 200
    assert synthetic.conversation(1, 0) != synthetic.conversation(2, 0)
    assert synthetic.conversation(1, 0).messages != synthetic.conversation(1, 0, "test").messages


def test_the_conversations_never_change():
    """A change here means that the embedded checkpoint can't be reproduced any more: train and export it again."""
    messages = [synthetic.conversation(0, index).messages for index in range(200)]
    assert hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).hexdigest() == "f1b3d63bd7bb31d1"


def test_train_and_test_problems_are_disjoint():
    train = {sample.key for sample in draw(1500)} - {""}
    test = {sample.key for sample in draw(300, "test")} - {""}
    assert len(train) > 800 and len(test) > 150
    assert not train & test
    assert all(synthetic.is_held_out(key) for key in test) and not any(map(synthetic.is_held_out, train))


def test_facts_of_single_digits_are_never_held_out():
    assert not any(synthetic.is_held_out(f"{a}{sign}{b}") for a, b, sign in itertools.product(range(10), range(10), "+-*/"))
    assert 300 < sum(synthetic.is_held_out(f"{a}+{b}") for a, b in itertools.product(range(10, 100), repeat=2)) < 700  # 1 in 16 of 8,100


@pytest.mark.parametrize("family", FAMILIES)
def test_every_equation_of_a_working_is_true_and_the_reply_states_the_answer(family):
    for index in range(60):
        problem, _ = synthetic.problem_prompt(3, index, family, "high")
        for line in f"{arithmetic.brief(problem.working)}\n{problem.working}\n{problem.check}".splitlines():
            for chain, remainder, left in EQUATIONS.findall(line):
                first, *others = chain.split("=")
                expected = divmod(*map(int, first.split("/"))) if "/" in first else (eval(first), 0)
                assert all(eval(other) == expected[0] for other in others), (problem, line)
                assert int(remainder or left or 0) == expected[1], (problem, line)
        assert problem.reply.rstrip(".").endswith(problem.answer)
        value, _, remainder = problem.answer.partition(" remainder ")
        assert eval(problem.code) == int(value)


def test_workings_of_the_awkward_cases():
    assert arithmetic.add(999, 1).splitlines() == ["999+1", "ones: 9+1=10", "tens: 9+0+1=10", "hundreds: 9+0+1=10", "999+1=1000"]
    assert arithmetic.subtract(100, 1).splitlines() == ["100-1", "ones: 10-1=9", "tens: 10-1-0=9", "hundreds: 1-1-0=0", "100-1=99"]
    assert arithmetic.subtract(3, 12).splitlines()[0] == "3 is less than 12"
    assert arithmetic.subtract(3, 12).splitlines()[-1] == "3-12=-9"
    assert arithmetic.multiply(47, 6).splitlines() == ["47*6", "ones: 7*6=42", "tens: 4*6+4=24+4=28", "47*6=282"]
    assert arithmetic.multiply(40, 20).splitlines()[-1] == "40*20=800"
    assert arithmetic.divide(605, 5).splitlines() == [
        "605/5", "1*5=5, 6/5=1, left 1", "2*5=10, 10/5=2, left 0", "1*5=5, 5/5=1, left 0", "605/5=121"]
    assert arithmetic.divide(3, 7).splitlines()[-1] == "3/7=0 remainder 3"
    assert arithmetic.compare(345, 354).splitlines()[1:] == ["3=3", "4<5", "354 is larger"]


def test_a_brief_working_is_one_line_of_its_steps():
    assert arithmetic.brief(arithmetic.add(47, 85)) == "7+5=12; 4+8+1=13"
    assert arithmetic.brief(arithmetic.divide(605, 5)).startswith("1*5=5, 6/5=1, left 1; 2*5=10")
    assert arithmetic.brief(arithmetic.compare(345, 354)) == "3=3; 4<5"
    assert arithmetic.brief(arithmetic.compare(7, 354)) == arithmetic.brief(arithmetic.add(2, 3)) == ""


def test_analysis_grows_with_the_effort():
    def length(effort):
        samples = draw(200, skill="arithmetic", effort=effort)
        return sum(len(text(message)) for sample in samples for message in turn(sample) if message["channel"] == "analysis") / len(samples)

    low, medium, high = map(length, EFFORTS)
    assert low < 0.8 * medium and 1.3 * medium < high


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_effort_is_named_in_the_system_message(effort):
    assert all(sample.messages[0]["content"][0]["reasoning_effort"] == effort for sample in draw(30, effort=effort))


def test_calls_fit_their_declaration():
    kinds = {"string": str, "number": int, "integer": int}
    for sample in draw(300, skill="function"):
        call = next((message for message in turn(sample) if message.get("recipient", "").startswith("functions.")), None)
        if call is None:
            assert sample.key == ""
            continue
        content = sample.messages[1]["content"][0]
        tool = next(tool for tool in content["tools"]["functions"]["tools"] if f"functions.{tool['name']}" == call["recipient"])
        arguments, parameters = json.loads(text(call)), tool["parameters"]
        assert set(parameters["required"]) <= set(arguments) <= set(parameters["properties"])
        for key, value in arguments.items():
            declared = parameters["properties"][key]
            assert isinstance(value, kinds[declared["type"]]) and value in declared.get("enum", [value])


def test_answers_to_a_response_format_fit_its_schema():
    kinds = {"string": str, "number": int, "integer": int, "boolean": bool, "array": list}
    for sample in draw(200, skill="json"):
        developer = "".join(item.get("text") or item.get("instructions") or "" for item in sample.messages[1]["content"])
        schema = json.loads(developer[developer.index("\n{") :])
        answer = json.loads(text(turn(sample)[-1]))
        assert list(answer) == list(schema["properties"])
        assert all(isinstance(value, kinds[schema["properties"][key]["type"]]) for key, value in answer.items())


def test_python_calls_print_what_the_tool_answers():
    for sample in draw(100, "test", skill="python"):
        call, result, final = turn(sample)[-3:]
        assert (call["recipient"], call["content_type"]) == ("python", "code")
        assert str(eval(text(call).removeprefix("print"))) == text(result).strip()
        assert text(final) == f"The answer is {text(result).strip()}."


def test_every_conversation_is_harmony_with_one_final_message_at_its_end():
    for sample in draw(300):
        assert sample.messages[-1]["channel"] == "final"
        assert sample.messages[sample.prompt_length - 1]["role"] == "user"
        assert harmony.drop_past_analysis(sample.conversation)["messages"] is not None


def test_a_split_or_skill_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="split is 'validation'"):
        synthetic.conversation(0, 0, "validation")
