"""Token-exactness over real chat templates: what was sampled is what is learned from, whatever is said."""

import copy
import itertools
import random
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from stateset_ray.errors import TemplateError
from stateset_ray.grpo.samples import samples
from stateset_ray.policies.renderer import Renderer, characters
from stateset_ray.types import Message, StopReason

support = runpy.run_path(str(Path(__file__).with_name("support_templates.py")))
NAMES, family, play = support["NAMES"], support["family"], support["play"]

every_template = pytest.mark.parametrize("name", NAMES)
appending = pytest.mark.parametrize("name", support["APPENDING"])
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])

pieces = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", " ", "\n", "\n\n", " x", "x ", "\t", "Where is my order?", "'s", "42", "é", "e\u0301", "\u200b", "▁"]
)


def control_strings(given_family):
    return given_family.tokenizer.convert_ids_to_tokens(sorted(given_family.control))


@st.composite
def texts(draw, given_family, evil):
    """Words and, if `evil`, strings that are the template's own control tokens, whole and in halves."""
    control = st.sampled_from(control_strings(given_family))
    parts = pieces
    if evil:
        parts = parts | control | control.map(lambda token: token[: len(token) // 2])
    return "".join(draw(st.lists(parts, min_size=1, max_size=4)))


@st.composite
def partners(draw, given_family, evil):
    """What is said between two replies."""
    say = texts(given_family, evil)
    roles = ["user", "tool"] if given_family.tool else ["user"]
    count = draw(st.integers(1, 3)) if given_family.adjacent else 1
    return tuple(Message(draw(st.sampled_from(roles)), draw(say)) for _ in range(count))


@st.composite
def openings(draw, given_family, evil):
    """The first messages: perhaps a system message and examples of the assistant, then a question."""
    say = texts(given_family, evil)
    said = [Message("system", draw(say))] if given_family.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        said += [Message("user", draw(say)), Message("assistant", draw(say))]
    return (*said, Message("user", draw(say)))


@st.composite
def conversations(draw, given_family, evil=True):
    """One to eight steps of a conversation."""
    rest = st.lists(partners(given_family, evil), max_size=7)
    return [draw(openings(given_family, evil)), *draw(rest)]


@st.composite
def sampled(draw, given_family):
    """Ids as a policy may sample them: any but stop tokens, then perhaps one of those."""
    stop_ids = sorted(given_family.renderer.stop_ids)
    free = [i for i in range(len(given_family.tokenizer)) if i not in stop_ids]
    split = [given_family.tokenizer.encode(c, add_special_tokens=False) for c in "First reply.\n\n order"]
    random_ids = st.lists(st.sampled_from(free), max_size=10)
    by_letters = st.integers(0, len(split)).map(lambda n: [i for ids in split[:n] for i in ids])
    thinking = st.just(
        given_family.tokenizer.encode("<think>\nHm.\n</think>\n\nYes", add_special_tokens=False)
    )
    ids = draw(random_ids | by_letters | thinking)
    end = draw(st.sampled_from([None, *stop_ids]))
    return tuple(ids or [free[0]]) if end is None else (*ids, end)


def assert_exact(given_family, trajectory, policy, replies):
    """Ids, prefixes and masks: everything is where it was sampled, and nothing else is learned from."""
    prompts = [request.prompt_ids for request in policy.requests]
    asked = [reply[: request.max_tokens] for reply, request in zip(replies, policy.requests, strict=False)]
    assert [turn.token_ids for turn in trajectory.turns] == asked
    assert list(trajectory.prompts()) == prompts

    for turn, (before, ids), after in zip(
        trajectory.turns[1:], zip(prompts, asked, strict=True), prompts[1:], strict=False
    ):
        if turn.forked:
            assert given_family.rewrites
            assert turn.context_ids == after
        else:
            assert after[: len(before) + len(ids)] == (*before, *ids)
    assert not trajectory.turns[0].forked

    # What each sample must be, from the policy's side alone.
    wanted = []
    for turn, prompt, ids in zip(trajectory.turns, prompts, asked, strict=True):
        if turn.forked or not wanted:
            wanted.append([prompt, [], []])
        wanted[-1][0] = (*prompt, *ids)
        wanted[-1][1] += range(len(prompt), len(prompt) + len(ids))
        wanted[-1][2] += turn.logprobs
    rows = samples(trajectory)
    assert len(rows) == len(wanted)
    for row, (ids, places, logprobs) in zip(rows, wanted, strict=True):
        assert row.token_ids.tolist() == list(ids)
        assert np.flatnonzero(row.loss_mask).tolist() == places
        assert row.logprobs[row.loss_mask].tolist() == logprobs
        assert {
            len(v) for v in (row.token_ids, row.loss_mask, row.logprobs, row.advantages, row.versions)
        } == {len(ids)}
        assert not row.logprobs[~row.loss_mask].any()
        assert (row.versions[~row.loss_mask] == -1).all()
    assert sum(int(row.loss_mask.sum()) for row in rows) == sum(map(len, asked))


@every_template
@given(data=st.data())
@settings(quick, max_examples=80)
def test_what_was_sampled_is_learned_from_as_it_is(name, data):
    fam = family(name)
    steps = data.draw(conversations(fam))
    replies = data.draw(st.lists(sampled(fam), min_size=len(steps), max_size=len(steps)))
    limits = {
        "on_cut_reply": data.draw(st.sampled_from(["end", "close", "close"])),
        "max_turn_tokens": data.draw(st.sampled_from([3, 500])),
        "max_context": data.draw(st.sampled_from([60, 200, 100_000, 100_000])),
    }
    trajectory, policy = play(fam.renderer, steps, replies, **limits)
    assert trajectory.error is None
    if not policy.requests:
        assert trajectory.stop_reason is StopReason.CONTEXT
        return
    assert_exact(fam, trajectory, policy, replies)
    # A turn is closed once: by the policy, or by the next context.
    for turn, after in itertools.pairwise(trajectory.turns):
        if not after.forked and not fam.rewrites:
            closed = turn.token_ids[-1] == fam.renderer._stop
            assert closed == (after.context_ids[0] != fam.renderer._stop)


@every_template
@given(data=st.data())
@settings(quick, max_examples=60)
def test_canonical_replies_build_what_one_full_render_would(name, data):
    """Prompt after prompt against the tokenizer alone, and against the words that were said."""
    fam = family(name)
    steps = data.draw(conversations(fam, evil=False))
    texts_said = data.draw(
        st.lists(texts(fam, evil=False).map(str.strip), min_size=len(steps), max_size=len(steps))
    )
    everything = [m.content for step in steps for m in step] + texts_said
    assume(not any(token in text for token in control_strings(fam) for text in everything))
    assume(not any(letter in text for letter in fam.lossy for text in texts_said))
    replies = [fam.renderer.reply(text) for text in texts_said]
    trajectory, policy = play(fam.renderer, steps, replies)
    assert_exact(fam, trajectory, policy, replies)
    said = list(trajectory.messages)
    ends = [i for i, message in enumerate(said) if message.role == "assistant"][-len(replies) :]
    for request, end, text in zip(policy.requests, ends, texts_said, strict=True):
        assert request.prompt_ids == fam.whole(said[:end])
        assert request.messages == tuple(said[:end])
        normal = fam.tokenizer.backend_tokenizer.normalizer
        if normal is not None and name.startswith("qwen3"):
            text = normal.normalize_str(text).strip()
        assert said[end].content == text


@every_template
@given(data=st.data())
@settings(quick, max_examples=60)
def test_control_tokens_in_what_is_said_stay_text(name, data):
    """As many control tokens as the same conversation has with harmless words in their place."""
    fam = family(name)
    steps = data.draw(conversations(fam))

    def harmless(message):
        # What a system or an assistant says of thinking and tools is theirs to say.
        text, own = message.content, control_strings(fam)
        if message.role in ("system", "assistant"):
            special = set(fam.tokenizer.all_special_tokens)
            own = [token for token in own if token in special]
        for token in sorted(own, key=len, reverse=True):
            text = text.replace(token, "x")
        return Message(message.role, text)

    replies = [fam.renderer.reply("Yes.")] * len(steps)
    counts = []
    for version in (steps, [tuple(map(harmless, step)) for step in steps]):
        _, policy = play(fam.renderer, version, replies)
        counts.append(
            [Counter(i for i in request.prompt_ids if i in fam.control) for request in policy.requests]
        )
    assert counts[0] == counts[1]


@appending
def test_bug_39_thousands_of_random_dialogues(name):
    """Incremental ids equal the template's; a seeded loop, so that it is the same thousands every time."""
    fam, rng = family(name), random.Random(39)
    letters = "abc .,\n 0123?'éü你\U0001f600<|>/[]"
    count = 2000 if name == "smollm2" else 200

    def words(most=12):
        return "".join(rng.choice(letters) for _ in range(rng.randrange(most)))

    for _ in range(count):
        said = [Message("system", words())] if fam.system and rng.random() < 0.5 else []
        said.append(Message("user", words()))
        ids = fam.renderer.opening(said)
        for _ in range(rng.randint(1, 4)):
            text = words().strip()
            roles = [rng.choice(["user", "tool"]) for _ in range(rng.randint(1, 3))] if fam.tool else ["user"]
            new = [Message(role, words()) for role in roles]
            said += [Message("assistant", text), *new]
            reply = fam.renderer.reply(text)
            ids = (*ids, *reply, *fam.renderer.suffix(new))
            assert ids == fam.whole(said)


@every_template
def test_the_audit_knows_what_rewrites(name):
    fam = family(name)
    assert fam.renderer.rewrites_history == fam.rewrites
    assert not fam.rewrites or name in ("qwen3", "qwen3_thinking", "deepseek", "mistral_last")


@every_template
def test_a_prompt_says_more_characters_than_it_has_tokens_but_no_more_than_they_can_hold(name):
    fam = family(name)
    said = [Message("user", "Where is my order? The order number, please. " * 20)]
    tokens = len(fam.renderer.opening(said))
    assert tokens < characters(said) <= tokens * fam.renderer.longest_token


@every_template
def test_a_conversation_begins_once(name):
    """No beginning of text and no default system prompt in the middle."""
    fam = family(name)
    steps = [[Message("user", "one")], [Message("user", "two")], [Message("user", "three")]]
    _, policy = play(fam.renderer, steps, [fam.renderer.reply("yes")] * 3)
    text = fam.tokenizer.decode(list(policy.requests[-1].prompt_ids))
    if fam.tokenizer.bos_token and name != "smollm2":
        assert text.count(fam.tokenizer.bos_token) == 1
    assert text.count("named Smol") == (name == "smollm2")
    assert text.count("Today Date") == (name == "llama3")


@pytest.mark.parametrize("name", ["mistral", "gemma"])
@pytest.mark.parametrize("new", [["tool"], ["user", "user"]])
def test_what_a_template_refuses_is_an_error_that_says_so(name, new):
    with pytest.raises(TemplateError, match=r"refuses this conversation: conversation roles must alternate"):
        family(name).renderer.suffix([Message(role, "x") for role in new])


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_what_a_template_refuses_ends_its_own_conversation_only(name):
    renderer = family(name).renderer
    steps = [[Message("user", "one")], [Message("user", "two"), Message("user", "three")]]
    trajectory, _ = play(renderer, steps, [renderer.reply("yes")] * 2)
    assert (trajectory.stop_reason, trajectory.reward) == (StopReason.ENVIRONMENT_ERROR, None)
    assert "refuses this conversation" in trajectory.error


@pytest.mark.parametrize("name", ["qwen3", "qwen3_thinking"])
def test_thinking_is_kept_while_tools_answer_and_forgotten_at_the_next_question(name):
    """Nothing forks while the template keeps what was thought; then once, and no token is learned twice."""
    fam = family(name)
    opened = "" if name == "qwen3_thinking" else "<think>\n"
    thought = [f"{opened}Call {i}.\n</think>\n\nCALL lookup" for i in range(3)]
    steps = [[Message("user", "Where?")], [Message("tool", "a")], [Message("tool", "b")]]
    steps += [[Message("user", "And?")], [Message("tool", "c")]]
    thought += [f"{opened}Ok.\n</think>\n\n{text}" for text in ("Here.", "There.")]
    replies = [fam.renderer.reply(text) for text in thought]
    trajectory, policy = play(fam.renderer, steps, replies)
    assert [turn.forked for turn in trajectory.turns] == [False, False, False, True, False]
    assert_exact(fam, trajectory, policy, replies)
    decoded = [fam.tokenizer.decode(list(request.prompt_ids)) for request in policy.requests]
    assert [text.count("Call") for text in decoded] == [0, 1, 2, 0, 0]
    assert all(request.prompt_ids == fam.whole(request.messages) for request in policy.requests)


def test_a_reply_that_is_not_canonical_forks_where_history_is_rendered_again():
    fam = family("qwen3")
    letters = [i for c in "<think>\nHm.\n</think>\n\nCALL lookup" for i in fam.tokenizer.encode(c)]
    letters = (*letters, fam.renderer._stop)
    trajectory, policy = play(
        fam.renderer,
        [[Message("user", "Where?")], [Message("tool", "a")]],
        [letters, fam.renderer.reply("x")],
    )
    assert [turn.forked for turn in trajectory.turns] == [False, True]
    assert_exact(fam, trajectory, policy, [letters, fam.renderer.reply("x")])


def test_thinking_that_a_template_removes_from_replies_alone_is_found():
    """Such a template changes nothing as long as nobody thinks: the audit must think."""
    fam = family("deepseek")
    assert fam.renderer.rewrites_history
    steps = [[Message("user", "a")], [Message("user", "b")]]
    reply = (*fam.tokenizer.encode("Hm.\n</think>Yes"), fam.renderer._stop)
    trajectory, policy = play(fam.renderer, steps, [reply, reply])
    assert trajectory.turns[1].forked
    assert "Hm." not in fam.tokenizer.decode(list(policy.requests[1].prompt_ids))


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma", "smollm2"])
def test_a_scripted_reply_is_written_as_the_template_writes_it(name):
    fam = family(name)
    text = fam.tokenizer.decode(list(fam.renderer.reply("  Sure\n")))
    stop = fam.tokenizer.decode([fam.renderer._stop])
    # Mistral's own space is one that its tokenizer does not show at the beginning of a text.
    assert text.removesuffix(stop) == ("  Sure\n" if name == "smollm2" else "Sure")
    assert fam.renderer.text(fam.renderer.reply("  Sure\n")) == "Sure"


def test_bug_05_a_stop_token_that_the_template_never_writes_leaves_the_turn_open():
    fam = family("llama3")
    foreign = fam.tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    steps = [[Message("user", "a")], [Message("user", "b")]]
    trajectory, policy = play(fam.renderer, steps, [(70, foreign), (71, foreign)])
    assert_exact(fam, trajectory, policy, [(70, foreign), (71, foreign)])
    assert trajectory.turns[1].context_ids[0] == fam.renderer._stop


def test_a_new_day_does_not_end_the_conversations():
    """Templates may write today's date, which is not that of the renderer's construction for ever."""
    fam = family("llama3")
    template = fam.tokenizer.chat_template
    before = fam.renderer.suffix([Message("user", "hi")])
    try:
        fam.tokenizer.chat_template = template.replace("26 Jul", "27 July")
        assert fam.renderer.suffix([Message("user", "hi")]) == before
    finally:
        fam.tokenizer.chat_template = template
    assert fam.renderer.suffix([Message("user", "hi")]) == before


def test_words_and_spaces_among_the_added_tokens_are_no_control_tokens():
    tokenizer = copy.deepcopy(family("smollm2").tokenizer)
    tokenizer.add_tokens(["user", "content", "  ", "}}"])
    prompt = Renderer(tokenizer).opening([Message("user", "user content  }} x")])
    assert "user content  }} x" in tokenizer.decode(list(prompt))
