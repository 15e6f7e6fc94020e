"""A model behind an OpenAI-compatible server as a generator."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from research.errors import ConfigError
from research.generation.answers import read_answer
from research.generation.background import in_background
from research.generation.base import AbstractGenerator, Prompt, Written
from research.generation.client import CompletionClient, ServerUnavailable
from research.generation.connection import Connection
from research.generation.cost import GenerationCost
from research.generation.distribution import check_sampling
from research.records import Completion, Sampling
from research.seeding import rng_for, seed_for

PATHS = {"completions": "completions", "chat": "chat/completions"}
OWN_FIELDS = ("model", "prompt", "messages", "n", "temperature", "top_p", "max_tokens", "seed", "stream")
SEEDS = 2**31  # servers seed several libraries, some with 32 bits


class ServerGenerator(AbstractGenerator):
    """Asks a server that speaks OpenAI's protocol, such as vLLM, SGLang, llama.cpp or `transformers serve`.

    base_url             with its version, such as http://127.0.0.1:8000/v1
    model                the name that the server knows it by
    endpoint             "completions": the prompt's text is continued as it is. "chat": it is the user's message, which
                         the server puts into the model's template; give prompts without a template
    system_prompt        of a chat
    api_key_env          name of the environment variable that holds the key; it is sent to the server and shown nowhere
    concurrency          prompts under way at once
    choices_per_request  1 for servers that ignore "n" (`transformers serve`); None: as many as are missing
    extra_body           more fields of every request. A server applies the `generation_config` of its model unless told
                         otherwise, so switch its penalties and top-k off here, in the server's own words. A chat
                         template's text holds the BOS: where the server of "completions" adds one, tell it not to
                         (vLLM: ``add_special_tokens: false``)
    timeout_s, max_retries, backoff_s, max_wait_s   see :class:`CompletionClient`

    Every request has a seed made of (seed, prompt's index, first sample asked for); whether equal seeds give equal
    completions is up to the server. At temperature 0 one completion is asked for and copied. Completions have no
    logprob, and no ids unless the server sends ``token_ids``.

    A prompt is yielded when all its completions are there. Where fewer choices come than were asked for, the missing
    ones are asked for again; surplus ones are dropped; both are counted. A server that stays down raises
    ServerUnavailable after everything that is finished was yielded: the caller goes on later with the other prompts.

    events  counts over the generator's life: requests, "retry: ..." by reason, "missing choices", "surplus choices",
            "finish_reason ..." other than stop and length, "answers without usage", and "equal samples": prompts all
            of whose samples came out the same at a temperature above 0, as from a server that does not sample
    spent   tokens as the server counts them, FLOPs None, seconds that the caller waited
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        endpoint: Literal["completions", "chat"] = "completions",
        system_prompt: str | None = None,
        api_key_env: str | None = None,
        concurrency: int = 8,
        choices_per_request: int | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 8,
        backoff_s: float = 0.5,
        max_wait_s: float = 60.0,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if endpoint not in PATHS:
            raise ConfigError(f"generator.endpoint is {endpoint!r}; expected one of {sorted(PATHS)}")
        if system_prompt is not None and endpoint != "chat":
            raise ConfigError(
                "generator.system_prompt belongs to a chat; give endpoint=chat, or write it in the prompt"
            )
        if choices_per_request is not None and choices_per_request < 1:
            raise ConfigError(f"generator.choices_per_request is {choices_per_request}; expected at least 1")
        self._connection = Connection(
            "generator",
            base_url,
            api_key_env,
            concurrency,
            timeout_s,
            max_retries,
            backoff_s,
            max_wait_s,
            fixed=dict(extra_body or {}),
            own=OWN_FIELDS,
        )
        self._url = f"{self._connection.base_url}/{PATHS[endpoint]}"
        self._fixed = {**self._connection.fixed, "model": model}
        self._system_prompt = system_prompt
        self._chat = endpoint == "chat"
        self._choices_per_request = choices_per_request
        self.events: Counter[str] = Counter()
        self.spent = GenerationCost(flops=None, prompt_flops=None, prompt_seconds=None)  # a server tells neither
        self.identity = {
            "kind": "server",
            "base_url": self._connection.base_url,
            "model": model,
            "endpoint": endpoint,
            "system_prompt": system_prompt,
            "extra_body": dict(extra_body or {}),
        }

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Written]:
        """Each prompt's completions once, as they are ready.

        Raises ConfigError for a sampling without meaning and ServerRefusal where the server will not take a request,
        ValueError for two prompts with one index, ServerUnavailable as said above.
        """
        check_sampling(sampling)
        twice = [index for index, count in Counter(prompt.index for prompt in prompts).items() if count > 1]
        if twice:
            raise ValueError(f"prompt {twice[0]} is given twice; expected one prompt per index: it names the seed")
        return self._generate(prompts, sampling)

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Written]:
        async def work(client: CompletionClient, prompt: Prompt) -> tuple[Written, GenerationCost]:
            return await self._write(client, prompt, sampling)

        opened = partial(self._connection.opened, self._url, self.events)
        results = in_background(opened, work, prompts, min(self._connection.concurrency, max(1, len(prompts))))
        finished = 0
        try:
            while True:
                started = time.perf_counter()
                result = next(results, None)
                self.spent += GenerationCost(flops=None, seconds=time.perf_counter() - started)
                if result is None:
                    return
                self.spent += result[1]
                finished += 1
                yield result[0]
        except ServerUnavailable as error:
            raise ServerUnavailable(
                f"{error}; {finished} of {len(prompts)} prompts were finished and handed on. Look at the server, then "
                "run the same command again: it goes on with the others"
            ) from None
        finally:
            results.close()

    async def _write(
        self, client: CompletionClient, prompt: Prompt, sampling: Sampling
    ) -> tuple[Written, GenerationCost]:
        wanted = 1 if sampling.temperature == 0 else sampling.num_samples
        own_seed = seed_for(sampling.seed, "completions", prompt.index)
        jitter = rng_for(own_seed, "back-off")
        completions: list[Completion] = []
        cost = GenerationCost(flops=None)
        while len(completions) < wanted:
            asked = min(wanted - len(completions), self._choices_per_request or wanted)
            seed = seed_for(own_seed, "request", len(completions)) % SEEDS
            answer = await client.ask(self._body(prompt, sampling, asked, seed), jitter, read_answer)
            given = len(answer.completions)
            if given != asked:
                self.events["missing choices" if given < asked else "surplus choices"] += abs(given - asked)
            completions += answer.completions[:asked]
            cost += GenerationCost(answer.prompt_tokens, answer.tokens, None)
        if wanted > 1 and len({(completion.text, completion.stop) for completion in completions}) == 1:
            self.events["equal samples"] += 1
        copies = sampling.num_samples // wanted
        return Written(prompt.index, tuple(completions) * copies), cost

    def _body(self, prompt: Prompt, sampling: Sampling, choices: int, seed: int) -> dict[str, Any]:
        if self._chat:
            system = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
            asked: dict[str, Any] = {"messages": [*system, {"role": "user", "content": prompt.text}]}
        else:
            asked = {"prompt": prompt.text}
        number = {"n": choices} if choices > 1 else {}  # 1 is the default, and some servers know no other
        return {
            **self._fixed,
            **asked,
            **number,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
        }
