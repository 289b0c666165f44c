"""The lm-eval-harness model: equal to logits, to our bits per byte and to our generation; tasks from local files."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from lightbulb.config import ConfigError  # noqa: E402
from lightbulb.data.loader import IGNORED_LABEL  # noqa: E402
from lightbulb.evaluation.harness import LightBulbLM, evaluate_tasks  # noqa: E402
from lightbulb.evaluation.results import FILE  # noqa: E402
from lightbulb.evaluation.runs import EvaluationConfig, Subject  # noqa: E402
from lightbulb.inference.generate import SamplingConfig, generate  # noqa: E402

TASKS = Path(__file__).parents[2] / "configs" / "tasks" / "python"
PAIRS = [
    ("3 wolf 4 forest", " 5."), ("3 wolf 4 forest", " river 6"), ("3 wolf 4 forest", "\n3 plus 4 minus 5."),
    ("7 plus", " 8"), ("", "night king"), ("x " * 60, "castle"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(trained: Path) -> LightBulbLM:
    return LightBulbLM(trained, batch_size=2)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_it_is_registered(model: LightBulbLM) -> None:
    assert get_model("lightbulb") is LightBulbLM and isinstance(model, get_model("lightbulb"))


def test_equality_of_loglikelihoods_with_logits(model: LightBulbLM) -> None:
    found = model.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (log_p, is_greedy) in zip(PAIRS, found, strict=True):
        whole = model.codec.encode_batch([context + continuation])[0]
        start = len(model.codec.encode_batch([context.rstrip()])[0])  # the harness moves blanks to the continuation
        if not context:
            whole, start = [model.eot_token_id, *whole], 1
        first = max(0, len(whole) - 33)
        logits = model.model(torch.tensor([whole[first:-1]]))[0].double().log_softmax(-1)[start - first - 1 :]
        gold = torch.tensor(whole[start:])
        # decoding from a cache sums in another order than one pass
        assert log_p == pytest.approx(float(logits.gather(1, gold[:, None]).sum()), rel=1e-4)
        assert is_greedy == bool((logits.argmax(-1) == gold).all())


def test_the_most_likely_token_is_greedy(model: LightBulbLM) -> None:
    ids = model.codec.encode_batch(["3 wolf 4"])[0]
    best = int(model.model(torch.tensor([ids]))[0, -1].argmax())
    other = (best + 1) % 300
    requests = [(("", ""), ids, [best]), (("", ""), ids, [other]), (("", ""), ids, [best, other])]
    assert [greedy for _, greedy in model._loglikelihood_tokens(requests, disable_tqdm=True)][:2] == [True, False]


def test_a_continuation_longer_than_the_context_is_refused(model: LightBulbLM) -> None:
    with pytest.raises(ConfigError, match="context_length is 32"):
        model.loglikelihood(instances("loglikelihood", ("a", " wolf" * 60)), disable_tqdm=True)


def test_equality_of_rolling_bits_with_ours(model: LightBulbLM) -> None:
    ids = model.codec.encode_batch(["3 wolf 4 forest 5. river plus 6 night " * 12])[0][: 3 * 32]
    text = model.codec.decode(ids)
    assert model.codec.encode_batch([text])[0] == ids and len(ids) == 96
    stream = torch.tensor([model.eot_token_id, *ids])  # rows of 33 that overlap by one, as preprocess packs them
    rows = torch.stack([stream[start : start + 33] for start in (0, 32, 64)])
    ours = float(model.model(rows[:, :-1], rows[:, 1:]).double().sum())
    (found,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert -found / math.log(2) / len(text) == pytest.approx(ours / math.log(2) / len(text), rel=1e-6)


def test_rolling_predicts_every_token_once(model: LightBulbLM) -> None:
    text = "3 wolf 4 forest 5. river plus 6 night castle " * 4
    ids = model.codec.encode_batch([text])[0]
    assert len(ids) % 32
    (found,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    expected, last = 0.0, len(ids) // 32 * 32
    stream = [model.eot_token_id, *ids]
    for start in range(0, last, 32):
        expected += float(
            model.model(*(torch.tensor([stream[start + i : start + 32 + i]]) for i in (0, 1))).double().sum()
        )
    labels = torch.tensor([[IGNORED_LABEL] * (32 - len(ids) + last) + stream[last + 1 :]])
    expected += float(model.model(torch.tensor([stream[-33:-1]]), labels).double().sum())  # with a full context
    assert found == pytest.approx(-expected, rel=1e-6)


def test_equality_of_generation_with_greedy_generate(model: LightBulbLM) -> None:
    prompts = ["3 wolf 4", "7 plus 8", "a", "9 river 1 night"]
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False}
    found = model.generate_until(instances("generate_until", *((p, settings) for p in prompts)), disable_tqdm=True)
    for prompt, text in zip(prompts, found, strict=True):
        ids = model.codec.encode_batch([prompt])[0]
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=12)
        expected = model.codec.decode(list(generate(model.model, ids, sampling, model.eot_token_id)))
        assert text == expected.partition("\n\n\n")[0]


def test_generation_stops_before_a_stop_text_and_at_the_end_of_the_context(model: LightBulbLM) -> None:
    (whole,) = model.generate_until(
        instances("generate_until", ("3 wolf 4", {"max_gen_toks": 10_000})), disable_tqdm=True
    )
    ids = model.codec.encode_batch(["3 wolf 4"])[0]
    limit = SamplingConfig(temperature=0.0, max_new_tokens=32 - len(ids))
    assert whole == model.codec.decode(list(generate(model.model, ids, limit, model.eot_token_id)))
    stop = whole[len(whole) // 2]
    settings = {"until": stop, "max_gen_toks": 10_000}
    assert model.generate_until(instances("generate_until", ("3 wolf 4", settings)), disable_tqdm=True) == [
        whole.partition(stop)[0]
    ]


def test_tasks_of_local_files_run_and_are_kept(trained: Path, copy_of: Callable[..., Path], tmp_path: Path) -> None:
    run, tasks = copy_of(trained), tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    found = evaluate_tasks(Subject(run, EvaluationConfig()), tasks)
    assert set(found) == {"python-choice", "python-complete", "python-text"}
    assert found["python-choice"]["samples"] == 8 and 0 <= found["python-choice"]["metrics"]["acc"] <= 1
    model = LightBulbLM(run)
    texts = [json.loads(line)["text"] for line in (tasks / "text.jsonl").read_text().splitlines()]
    nats = -sum(model.loglikelihood_rolling(instances("loglikelihood_rolling", *((t,) for t in texts)), True))
    size = sum(len(text.encode()) for text in texts)
    assert found["python-text"]["metrics"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    kept = json.loads((run / FILE).read_text())["tasks"]
    assert kept == found
    next((run / "checkpoints").glob("step-*/model-*.safetensors")).unlink()
    assert evaluate_tasks(Subject(run, EvaluationConfig()), tasks / "python-text.yaml") == {
        "python-text": found["python-text"]
    }


def test_no_task_is_said(trained: Path, tmp_path: Path) -> None:
    subject = Subject(trained, EvaluationConfig())
    with pytest.raises(ConfigError, match="no such file"):
        evaluate_tasks(subject, tmp_path / "none.yaml")
    for content in ("a: 1\n", "task: [other\n"):
        (tmp_path / "other.yaml").write_text(content)
        with pytest.raises(ConfigError, match="no task of lm-eval-harness"):
            evaluate_tasks(subject, tmp_path)


TASK = """task: t
dataset_path: {path}
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{answer}}}}"
"""
GOOD = {"path": "json", "file": "choice.jsonl", "text": "{{start}}"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "none.jsonl"}, ": t cannot be run: .*none.jsonl"),
        ({"path": "someone/something"}, ": t cannot be run: Couldn't reach 'someone/something' on the Hub"),
        ({"text": "{{start"}, ": t cannot be run: unexpected end of template"),
        ({"text": "{{begin}}"}, ": t cannot be run: 'begin' is undefined"),
    ],
)
def test_a_task_that_cannot_be_run_is_named(
    trained: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    shutil.copy(TASKS / "choice.jsonl", tmp_path)
    (tmp_path / "t.yaml").write_text(TASK.format(**GOOD | changes))
    with pytest.raises(ConfigError, match=f"--tasks: {tmp_path}{message}"):
        evaluate_tasks(Subject(trained, EvaluationConfig()), tmp_path / "t.yaml")
