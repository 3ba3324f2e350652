from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.evals.prefix_reuse import Budget, Scored, plan_requests, plan_steps

LARGE = Budget(tokens=10**6, cells=10**12)

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple)
inputs = st.lists(
    tokens.flatmap(lambda text: st.integers(1, len(text)).map(lambda count: Scored(text, count))), max_size=12
)
budgets = st.builds(
    Budget, st.integers(1, 12), st.integers(1, 150), bush_tokens=st.one_of(st.none(), st.integers(1, 12))
)


def run_steps(steps):
    """What the forwards see: for each score the tokens up to its row, as attention, positions and cache give them."""
    kept = []
    for step in steps:
        assert len(kept) >= step.num_cached
        kept = kept[: step.num_cached]
        seen = []
        for row, depth in enumerate(step.depths):
            chain = [other for other in range(row + 1) if row <= step.ends[other]]
            assert [step.depths[other] for other in chain] == list(range(step.num_cached, depth + 1))
            seen.append(tuple(kept + [step.tokens[other] for other in chain]))
        yield from ((score, seen[score.row]) for score in step.scores)
        if step.is_kept:
            assert len(seen[-1]) == step.num_cached + len(step.tokens)
            kept += step.tokens


@given(inputs, budgets, st.integers(0, 20))
def test_every_token_of_every_request_is_predicted_once_from_exactly_what_comes_before_it(inputs, budget, cost):
    times = Counter()
    for score, seen in run_steps(plan_steps(inputs, budget=budget, forward_cost=cost)):
        text, count = inputs[score.request].tokens, inputs[score.request].num_scored
        assert seen == text[: len(text) - count + score.place + 1]
        times[score.request, score.place] += 1
    assert times == {(request, place): 1 for request, scored in enumerate(inputs) for place in range(scored.num_scored)}


@given(inputs, budgets, st.integers(0, 20))
def test_no_forward_holds_more_than_the_budget(inputs, budget, cost):
    for step in plan_steps(inputs, budget=budget, forward_cost=cost):
        size = len(step.tokens)
        assert 1 <= size <= budget.tokens
        assert size == 1 or size * (step.num_cached + size) <= budget.cells
        assert step.is_kept or size <= (budget.bush_tokens or size)


@given(inputs)
def test_where_all_fits_one_forward_holds_each_distinct_prefix_once(inputs):
    steps = list(plan_steps(inputs, budget=LARGE))
    prefixes = {scored.tokens[:end] for scored in inputs for end in range(1, len(scored.tokens) + 1)}
    assert sum(len(step.tokens) for step in steps) == len(prefixes)
    assert len(steps) == (1 if inputs else 0)


def few_shot(questions, *, prefix=640, question=96, choices=4, choice=16):
    """Inputs of a multiple-choice task: distinct numbers where texts differ."""
    shared = tuple(range(prefix))
    return [
        Scored((*shared, *(10_000 * (q + 1) + i for i in range(question)), *range(-16 * c - choice, -16 * c)), choice)
        for q in range(questions)
        for c in range(1, choices + 1)
    ]


def test_a_few_shot_task_runs_its_prefix_and_each_question_once():
    plan = plan_requests(few_shot(6), budget=Budget(4096, 2**22), batch_size=4, hidden_size=512)
    assert plan.num_tokens == 640 + 6 * (96 + 4 * 16)
    assert plan.plain == ()
    assert plan.steps[0].is_kept
    assert not any(step.is_kept for step in plan.steps[1:])


def test_what_must_be_paid_before_is_weighed_against_what_is_saved():
    task = few_shot(1, prefix=20, question=20, choices=2)
    shape = {"budget": Budget(4096, 2**22), "batch_size": 1, "hidden_size": 512}
    assert plan_requests(task, **shape).plain == ()
    assert plan_requests(task, **shape, cost_before=500).plain == (0, 1)


def test_requests_that_share_nothing_run_plain_beside_those_that_share():
    loners = [Scored(tuple(range(90_000 + 100 * i, 90_060 + 100 * i)), 2) for i in range(3)]
    task = [loners[0], *few_shot(3), *loners[1:]]
    plan = plan_requests(task, budget=Budget(4096, 2**22), batch_size=4, hidden_size=512)
    assert plan.plain == (0, 13, 14)
    assert {score.request for step in plan.steps for score in step.scores} == set(range(1, 13))


@pytest.mark.parametrize(
    "task", [[], [Scored((1, 2, 3), 1)], [Scored((1, 2, 3), 1)] * 9, [Scored((i, i + 1, i + 2), 1) for i in range(50)]]
)
def test_nothing_is_planned_where_nothing_is_shared(task):
    plan = plan_requests(task, budget=Budget(4096, 2**22), batch_size=1, hidden_size=8)
    assert plan.steps == ()
    assert plan.plain == tuple(range(len(task)))


def test_thousands_of_contexts_that_continue_each_other_need_no_recursion():
    task = [Scored(tuple(range(length)), 1) for length in range(1, 3000)]
    steps = list(plan_steps(task, budget=Budget(64, 2**22)))
    assert 2999 <= sum(len(step.tokens) for step in steps) < 2 * 2999
    assert sum(len(step.scores) for step in steps) == 2999
