"""Messages to tokens: prefix identity turn after turn, what is refused, audits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateset_ray.errors import TemplateError
from stateset_ray.models import load_tokenizer
from stateset_ray.policies.renderer import Renderer, characters
from stateset_ray.policies.template import encoder, writer
from stateset_ray.types import Message, ToolCall

plain_text = st.text(st.characters(blacklist_categories=("Cs",)), max_size=30)
partner = st.lists(st.builds(Message, st.sampled_from(["user", "tool"]), plain_text), min_size=1, max_size=3)


@given(st.lists(st.tuples(partner, plain_text), min_size=1, max_size=4), plain_text)
@settings(max_examples=150, deadline=None)
def test_turn_by_turn_equals_one_full_render(renderer, dialogue, system):
    """Where sampled ids are the canonical encoding, incremental ids equal the template's."""
    messages = [Message("system", system)]
    ids: list[int] = []
    for new, reply in dialogue:
        if not ids:
            messages += new
            ids = list(renderer.opening(messages))
        else:
            messages += new
            ids += renderer.suffix(new)
        assert tuple(ids) == renderer._render(messages, prompt=True)
        ids += renderer.reply(reply)
        messages.append(Message("assistant", reply))


def test_a_tokenizer_without_template_is_refused():
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        Renderer(tokenizer)


def test_a_template_without_turn_ends_is_refused():
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(TemplateError, match="does not end a reply"):
        Renderer(tokenizer)


def test_a_template_that_rewrites_history_is_found_and_forks():
    tokenizer = load_tokenizer("tiny")
    # Like templates that drop the thinking of earlier replies: only the last reply is shown whole.
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if m['role'] != 'assistant' or loop.last else m['content'][:2] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(tokenizer)
    assert renderer.rewrites_history
    said = [Message("user", "a"), Message("assistant", "long reply"), Message("user", "b")]
    context, forked = renderer.next_prompt([1, 2, 3], said, 1, stopped=True)
    assert forked
    assert context == renderer.opening(said)


def test_bug_42_tools_that_the_template_drops_are_refused(renderer):
    with pytest.raises(TemplateError, match="ignores tools"):
        renderer.check_tools([{"name": "lookup", "description": "find an order"}])
    with pytest.raises(TemplateError, match="ignores tools"):
        renderer.check_tools([{"type": "function", "function": {"name": "user"}}])  # a word of any prompt


def test_what_is_remembered_is_of_one_template_and_gives_what_was_rendered():
    tokenizer = load_tokenizer("tiny")
    renderer, question = Renderer(tokenizer), [Message("user", "hi")]
    asked = [(renderer.opening(question), renderer.suffix(question), renderer.reply("hi")) for _ in range(2)]
    assert asked[0] == asked[1]
    assert renderer.opening(question) == renderer._render(question, prompt=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "human").replace("assistant", "bot")
    tokenizer.chat_template = "{{ 'x' }}" + tokenizer.chat_template
    assert renderer.opening(question) == renderer._render(question, prompt=True) != asked[0][0]


def test_a_template_that_writes_the_time_is_rendered_anew():
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{# {{ strftime_now('%H:%M') }} #}" + tokenizer.chat_template
    renderer = Renderer(tokenizer)
    renderer.opening([Message("user", "hi")])
    renderer.opening([Message("user", "hi")])
    assert renderer._opening.cache_info().hits == 0


def test_the_short_ways_are_taken_only_where_they_give_the_same():
    """A tokenizer whose own ways do more than its backend and its template is asked by its own ways."""

    class Loud(type(load_tokenizer("tiny"))):
        def encode(self, text, **options):
            return [*super().encode(text, **options), 3]

        def apply_chat_template(self, *args, **options):
            return super().apply_chat_template(*args, **options).upper()

    plain, loud = load_tokenizer("tiny"), load_tokenizer("tiny")
    loud.__class__ = Loud
    chat = [{"role": "user", "content": "hi"}]
    for tokenizer in (plain, loud):
        assert list(encoder(tokenizer)("a b")) == tokenizer.encode("a b", add_special_tokens=False)
        wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert writer(tokenizer)(chat, True, None) == wanted
    assert list(encoder(plain)("a b")) != list(encoder(loud)("a b"))


def test_messages_with_tool_calls_are_rendered_though_their_arguments_do_not_hash(renderer):
    call = ToolCall("lookup", {"order": "7"})
    said = [Message("user", "hi"), Message("assistant", "CALL", (call,)), Message("tool", "shipped")]
    assert renderer.opening(said) == renderer._render(said, prompt=True)


@given(st.lists(plain_text | st.sampled_from(["<|im_start|>", "assistant"]), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_no_prompt_says_more_characters_than_its_tokens_can_hold(renderer, texts):
    said = [Message("user", text) for text in texts]
    assert characters(said) <= len(renderer.opening(said)) * renderer.longest_token


def test_what_is_very_long_is_not_remembered():
    """A thousand prompts of a megabyte would fill a machine."""
    renderer, said = Renderer(load_tokenizer("tiny")), [Message("user", "x" * 20_000)]
    before = renderer._opening.cache_info().currsize, renderer._suffix.cache_info().currsize
    assert len(renderer.opening(said)) > 20_000
    assert len(renderer.suffix(said)) > 20_000
    assert (renderer._opening.cache_info().currsize, renderer._suffix.cache_info().currsize) == before
