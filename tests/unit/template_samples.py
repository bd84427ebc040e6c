"""Chat templates that use, between them, every construct that published ones use. By what each is about."""

from __future__ import annotations

LOOP = "{% for message in messages %}{{ bos_token }}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
GENERATE = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

TEMPLATES: dict[str, str] = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "loop": LOOP,
    "loop-generate": LOOP + GENERATE,
    "whitespace-control": "{%- for m in messages -%}\n  {{- m.role -}}\n  |{{ m.content }}|\n{%- endfor -%}\n  end",
    "whitespace-kept": "{%+ for m in messages %}\n    {{ m.role }}\n    {%+ if loop.last %}last{% endif +%}\n{% endfor %}\n\n",
    "lstrip-and-trim-blocks": "<s>\n  {% if messages %}\n    text\n  {% endif %}\n\t{# comment #}\nend\n",
    "comments": "{# one #}a{#- two -#} b {# three\nlines #}{{ messages | length }}",
    "alternation": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}",
    "system-first": "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = 'You are helpful.' %}{% endif %}<<SYS>>{{ system_message | trim }}<</SYS>>"
    "{% for m in loop_messages %}{{ m.content | trim }};{% endfor %}",
    "namespace": "{% set ns = namespace(found=false, text='', count=0) %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.found = true %}{% set ns.text = ns.text + m.content %}{% endif %}"
    "{% set ns.count = ns.count + 1 %}{% endfor %}{{ ns.found }} {{ ns.text }} {{ ns.count }}",
    "namespace-from-dict": "{% set ns = namespace({'a': 1}, b=2) %}{% set ns.a = ns.a + ns.b %}{{ ns.a }}",
    "namespace-underscore": "{% set ns = namespace(_a=1) %}{{ ns }}",
    "namespace-underscore-later": "{% set ns = namespace(a=1) %}{% set ns._b = 2 %}{{ ns.a }}",
    "macro": "{% macro turn(role, content='none', end=eos_token) -%}<{{ role }}>{{ content }}{{ end }}{%- endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m.content) }}{{ turn(role=m.role) }}{% endfor %}",
    "macro-varargs": "{% macro all() %}{{ varargs | join('-') }}{{ kwargs.x }}{% endmacro %}{{ all(1, 2, x=3) }}",
    "macro-caller": "{% macro box(title) %}[{{ title }}:{{ caller('in') }}]{% endmacro %}"
    "{% call(word) box('t') %}{{ word }}{{ messages[0].content }}{% endcall %}",
    "macro-recursive": "{% macro show(v) %}{% if v is mapping %}{% for k, x in v | items %}{{ k }}={{ show(x) }},{% endfor %}"
    "{% elif v is sequence and v is not string %}({% for x in v %}{{ show(x) }};{% endfor %})"
    "{% else %}{{ v }}{% endif %}{% endmacro %}{{ show(messages) }}{{ show({'a': [1, {'b': none}]}) }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eos|>' }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}" + GENERATE,
    "generation-whitespace": "{% for m in messages %}\n  {%- generation -%}\n  {{ m.content }}\n  {%- endgeneration %}\n{% endfor %}",
    "generation-scope": "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}",
    "generation-nested": "{% generation %}a{% generation %}b{{ messages[0].role }}{% endgeneration %}c{% endgeneration %}",
    "generation-without-end": "{% generation %}{{ messages[0].content }}",
    "tools-none": "{% if tools is not none %}TOOLS {{ tools | tojson }}{% endif %}{{ tools }}{{ documents }}",
    "tools-defined": "{% if tools is defined and tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% else %}"
    "no tools{% endif %}{% if not tools is defined %}never{% endif %}",
    "documents": "{% if documents %}{% for d in documents %}[{{ loop.index0 }}] {{ d.title }}: {{ d['text'] }}\n{% endfor %}{% endif %}",
    "tojson": "{{ messages | tojson }}|{{ {'é': '<&>\"', 'b': [1, 2.5, true, none]} | tojson }}",
    "tojson-indent": "{{ messages | tojson(indent=2) }}{{ messages | tojson(indent='\t') }}{{ [] | tojson(indent=2) }}",
    "tojson-arguments": "{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}"
    "{{ {'b': 1, 'a': 'é'} | tojson(true, 1, (';', '='), true) }}",
    "tojson-undefined": "{{ nothing | tojson }}",
    "strftime": "{{ strftime_now('%d') | length }}{{ strftime_now('literal') }}{{ strftime_now(format='%%') }}",
    "strftime-default": "{% if strftime_now is defined %}{% set d = strftime_now('%Y') %}{% else %}{% set d = 'x' %}{% endif %}"
    "{{ d | length }}",
    "raise": "{{ raise_exception('No: ' + messages[0].role) }}",
    "raise-if-long": "{% if messages | length > 2 %}{{ raise_exception('Only two messages') }}{% endif %}{{ messages[0].content }}",
    "slices": "{{ messages[1:] | length }}{{ messages[:-1] | length }}{{ messages[::-1][0].content }}{{ messages[-1]['role'] }}"
    "{{ messages[0].content[:3] }}{{ messages[0].content[-2:] }}{{ messages[0]['content'][1::2] }}",
    "reverse-search": "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% set i = (messages | length - 1) - loop.index0 %}"
    "{% if ns.last < 0 and m.role == 'user' %}{% set ns.last = i %}{% endif %}{% endfor %}{{ ns.last }}",
    "loop-variables": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}"
    "{{ loop.last }}{{ loop.length }}{{ loop.cycle('a', 'b') }}{{ loop.previtem.role }}{{ loop.nextitem.role }}"
    "{{ loop.changed(m.role) }}{{ loop.depth }} {% endfor %}",
    "loop-else": "{% for m in messages if m.role == 'nobody' %}{{ m }}{% else %}nobody{% endfor %}",
    "loop-filter": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "loop-recursive": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
    "loop-controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}",
    "unpacking": "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}{% set x, y = 1, 2 %}{{ x + y }}",
    "nested-access": "{% set tool = {'function': {'name': 'f', 'parameters': {'x': [{'type': 'int'}]}}} %}"
    "{{ tool.function.name }}{{ tool['function']['parameters'].x[0]['type'] }}{{ tool.function.missing is defined }}",
    "missing-attribute": "{{ messages[0].missing }}|{{ messages[0]['missing'] }}|{{ messages[0].get('missing') }}|"
    "{{ messages[0].get('missing', 'x') }}|{{ messages[0].missing | default('d') }}|{{ none | default('e', true) }}",
    "missing-of-missing": "{{ messages[0].missing.more }}",
    "undefined-call": "{{ nothing(1) }}",
    "undefined-added": "{{ 'a' + messages[0].missing }}",
    "string-methods": "{{ messages[0].content.strip() }}|{{ messages[0].content.upper() }}|{{ messages[0].content.split(' ')[0] }}|"
    "{{ messages[0].content.replace('e', 'E') }}|{{ messages[0].content.startswith('h') }}|{{ 'a,b'.split(',') | join('+') }}|"
    "{{ 'x'.join(['1', '2']) }}|{{ '  x '.lstrip() }}|{{ ' x '.rstrip() }}|{{ 'aXb'.lower() }}|{{ 'abc'.find('c') }}|"
    "{{ 'title case'.title() }}|{{ 'a\nb'.splitlines() }}|{{ '{} {x}'.format(1, x=2) }}|{{ 'abc'.endswith(('c', 'd')) }}",
    "think-split": "{% for m in messages %}{% set content = m.content %}{% set reasoning = '' %}"
    "{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ m.role }}<think>{{ reasoning.strip('\n') }}</think>{{ content }}\n{% endfor %}",
    "enable-thinking": "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "thinking-fields": "{% for m in messages %}{{ m.thinking }}/{{ m.reasoning }}/{{ m['reasoning_content'] }};{% endfor %}",
    "variables": "{{ level | default('low') }}{{ (extra or {}).get('x', 'y') }}{% if flags %}{{ flags | join(',') }}{% endif %}",
    "tests": "{{ messages is sequence }}{{ messages is iterable }}{{ messages[0] is mapping }}{{ messages[0].content is string }}"
    "{{ 1 is number }}{{ 1 is integer }}{{ 1.5 is float }}{{ true is boolean }}{{ none is none }}{{ x is undefined }}"
    "{{ x is not defined }}{{ 3 is odd }}{{ 4 is even }}{{ 4 is divisibleby(2) }}{{ 'a' is in ['a'] }}{{ true is true }}"
    "{{ false is false }}{{ 1 is eq 1 }}{{ 1 is ne 2 }}{{ 2 is gt 1 }}{{ 1 is sameas 1 }}{{ 'a' is lower }}{{ 'A' is upper }}"
    "{{ raise_exception is callable }}{{ 'trim' is filter }}{{ 'odd' is test }}",
    "filters": "{{ [3, 1, 2] | sort | join(' ') }}{{ [1, 2] | sum }}{{ [1, 2] | first }}{{ [1, 2] | last }}{{ [2, 1] | max }}{{ [2, 1] | min }}"
    "{{ 'abc' | reverse }}{{ 'a b' | wordcount }}{{ 'abc' | capitalize }}{{ 'abc' | title }}{{ -1 | abs }}{{ '12' | int + 1 }}"
    "{{ '1.5' | float }}{{ 2.567 | round(1) }}{{ [1, 1, 2] | unique | list }}{{ 'abc' | list }}{{ 1 | string }}{{ '%s-%d' | format('a', 2) }}"
    "{{ 'x' | center(5) }}{{ 'abcdef' | truncate(3, true, '..') }}{{ 'a<b' | e }}{{ 'a<b' | escape | safe }}{{ [1, 2, 3] | batch(2) | list }}"
    "{{ 'a' | upper }}{{ 'A' | lower }}{{ 'a-b' | replace('-', '+') }}{{ 'a-b-c' | replace('-', '+', 1) }}{{ {'a': 1} | dictsort }}"
    "{{ {'a': 1} | items | list }}{{ 'abc' | length }}{{ 'abc' | count }}{{ [] | default('x', true) }}{{ 'a' ~ 1 ~ none }}",
    "indent": "{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent(width=3, first=false, blank=true) }}"
    "|{{ messages[0].content | indent('> ') }}",
    "map-and-select": "{{ messages | map(attribute='role') | join(',') }}|{{ messages | map('length') | list }}|"
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}|"
    "{{ messages | rejectattr('role', '==', 'user') | list | length }}|{{ messages | selectattr('missing') | list }}|"
    "{{ [1, 2, 3, 4] | select('odd') | list }}|{{ [1, 2] | reject('even') | list }}|{{ messages | map(attribute='x', default='d') | list }}|"
    "{{ messages | groupby('role') | map('first') | list }}|{{ [[1, 2], [3]] | sum(start=[]) }}|{{ ['a'] | map('upper') | first }}",
    "arithmetic": "{{ 7 // 2 }}{{ 7 % 2 }}{{ 7 / 2 }}{{ 2 ** 3 }}{{ -1 }}{{ 1 + 2 * 3 }}{{ (1 + 2) * 3 }}{{ 'a' * 3 }}{{ 1 < 2 <= 2 }}"
    "{{ 1 == 1.0 }}{{ not 1 }}{{ 1 and 0 }}{{ 0 or 'x' }}{{ [1] + [2] }}{{ 'a' in 'abc' }}{{ 'a' not in 'abc' }}",
    "inline-if": "{{ 'yes' if messages | length > 1 else 'no' }}{{ 'yes' if false }}|{{ ('a' if x is defined else 'b') ~ 'c' }}",
    "elif": "{% for m in messages %}{% if m.role == 'user' %}U{% elif m.role == 'assistant' %}A{% elif m.role == 'system' %}S"
    "{% else %}{{ raise_exception('Unknown role: ' ~ m.role) }}{% endif %}{% endfor %}",
    "set-block": "{% set text %}  {{ messages[0].content }}\n{% endset %}[{{ text }}]{% set up | upper %}{{ text }}{% endset %}{{ up }}",
    "filter-block": "{% filter upper | trim %} {{ messages[0].content }} {% endfilter %}",
    "with-block": "{% with a = 1, b = messages[0].role %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}",
    "raw": "{% raw %}{{ not }} {% rendered %}{% endraw %}{{ '{{ x }}' }}",
    "globals": "{{ range(3) | list }}{{ range(1, 7, 2) | list }}{{ dict(a=1, b=2) }}{{ dict([('a', 1)]) }}{{ dict.fromkeys(['a', 'b'], 0) }}"
    "{% set c = cycler('x', 'y') %}{{ c.next() }}{{ c.next() }}{% set j = joiner('; ') %}{{ j() }}a{{ j() }}b",
    "dict-type": "{{ dict.__class__ }}",
    "dict-mutation": "{% set d = {'a': 1} %}{% set _ = d.update({'b': 2}) %}{{ d }}",
    "list-mutation": "{% set l = [] %}{% set _ = l.append(1) %}{{ l }}",
    "dict-union": "{% set d = dict({'a': 1}, **{'b': 2}) %}{{ d | tojson }}{{ d.keys() | list }}{{ d.values() | list }}{{ d.items() | list }}",
    "special-tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ image_token }}|{{ mask_token }}",
    "literals": "{{ [1, 'a', none, true, {'k': (1, 2)}] }}{{ none }}{{ None }}{{ True }}{{ 1.0 }}{{ 1e3 }}{{ 'a\\n\\t\"' }}{{ 1_000 }}",
    "unicode": "{{ 'é' }}漢字🙂{{ messages[0].content | length }}\u2028{{ '\\u00e9' }}",
    "content-parts": "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %};{% endfor %}",
    "include": "{% include 'other' %}",
    "extends": "{% extends 'other' %}",
    "block": "{% block a %}{{ messages[0].content }}{% endblock %}{{ self.a() }}",
    "do-tag": "{% do messages.append(1) %}",
    "debug-tag": "{% debug %}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "private": "{{ messages.__class__ }}{{ ''.__class__.__mro__ }}",
    "private-filter": "{{ messages | attr('__class__') }}{{ [messages] | map(attribute='__class__') | list }}",
    "format-escape": "{{ '{0.__class__}'.format(messages) }}",
    "division-by-zero": "{{ 1 // 0 }}",
    "infinite-recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "huge-range": "{% for i in range(9999999) %}{% endfor %}",
    "crlf": "a\r\n{% for m in messages %}\r\n{{ m.content }}\r\n{% endfor %}\r\nb",
    "final-trimmed": "{% for m in messages %}{{ m.role }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}" + GENERATE,
    "final-stripped": "{% for m in messages %}{{ m.role }}:{{ m.content.strip() }}<|end|>{% endfor %}",
    "final-lost": "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
    "final-changed": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "final-not-read": "{% for m in messages %}{{ m.role }}{% endfor %}",
    "final-twice": "{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}",
    "syntax-error": "{% if %}",
    "unknown-tag": "{% nothing %}",
    "unknown-filter": "{{ messages | nothing }}",
    "unclosed": "{% for m in messages %}",
    "break-outside": "{% break %}",
    "break-in-generation": "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
}
