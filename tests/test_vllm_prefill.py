"""What the plugin computes, against the transformers engine and against stock vLLM."""

# ruff: noqa: E402 (first of all, whether there is a vLLM)

import gc
import weakref

import pytest
import torch

vllm = pytest.importorskip("vllm")

from conftest import one_sentence
from vllm.exceptions import VLLMValidationError
from vllm_tiny import answer, engine, folders, inside, logprobs_of, prompt, runner_of, tokens_of, vllm_model

import fastfill
from fastfill import families
from fastfill.compensator import Compensator
from fastfill.engines.transformers import generate
from fastfill.errors import UserError
from fastfill.ffn import FFN
from fastfill.kernels.int8 import Scales
from fastfill.predictor import LearnedPredictor
from fastfill.sparse_ffn import SparseFFN, current_plan
from fastfill.vllm_plugin import models, requests, steps

pytestmark = pytest.mark.vllm
PROMPTS = [prompt(n) for n in (500, 97, 300, 95, 20)]


def expected(family, artifact, prompts, tokens=12, change=lambda attachment: None, **settings):
    """What the transformers engine answers with the same artifact, with log-probabilities, and what the dense model does."""
    model, results = vllm_model(family), []
    with fastfill.attach(model, artifact, **settings) as attachment:
        change(attachment)
        for ids in prompts:
            row = torch.tensor([ids])
            new = generate(model, row, tokens)
            with attachment.dense():
                dense = generate(model, row, tokens).tolist()
            with torch.no_grad():
                cache = model(input_ids=row, use_cache=True)
                first = cache.logits[0, -1].log_softmax(-1)
                rest = model(input_ids=new[None, :-1], past_key_values=cache.past_key_values).logits[0].log_softmax(-1)
            lines = torch.cat([first[None], rest])
            results.append((new.tolist(), lines.gather(1, new[:, None])[:, 0].tolist(), dense))
        sparse = attachment.stats
    assert sparse.sparse_tokens > 0
    return results


@pytest.mark.parametrize("family", [name for name, row in families.FAMILIES.items() if row.vllm])
def test_answers_are_those_of_the_transformers_engine(family):
    """Same tokens, and log-probabilities within 1e-4: both run in fp32 (24 bits), the sums differ in order only. Dense answers
    differ from sparse ones for every prompt that is long enough, so a plugin that stays dense would not pass."""
    model, artifact = folders(family)
    wanted = expected(family, artifact, PROMPTS)
    with engine(model, artifact, family=family) as llm:
        found = answer(llm, PROMPTS)
        _, loaded = inside(llm)
        assert type(loaded).__name__.startswith("Fastfill")
        # 500 -> 448 (32..480), 97 -> 64, 300 -> 256 (32..288), 95 and 20: shorter than 96
        assert loaded.stats.sparse_tokens == 448 + 64 + 256
    for ids, output, (new, logprobs, dense) in zip(PROMPTS, found, wanted, strict=True):
        assert tokens_of([output])[0] == new
        assert logprobs_of(output) == pytest.approx(logprobs, abs=1e-4)
        assert (new == dense) == (len(ids) < 96)


@pytest.fixture(scope="module")
def stock():
    model, _ = folders()
    with engine(model) as llm:
        assert type(inside(llm)[1]).__name__ == "LlamaForCausalLM"
        found = answer(llm, PROMPTS)
        return tokens_of(found), [logprobs_of(output) for output in found]


def test_without_an_artifact_and_at_sparsity_0_it_is_stock_vllm(stock):
    """To the last bit."""
    with engine(*folders(), fastfill={"sparsity": 0.0}) as llm:
        found = answer(llm, PROMPTS)
    assert tokens_of(found) == stock[0]
    assert [logprobs_of(output) for output in found] == stock[1]


def test_a_request_that_is_switched_off_is_stock_vllm(stock):
    with engine(*folders()) as llm:
        found = answer(llm, PROMPTS, sparse=False)
        assert tokens_of(found) == stock[0]
        assert [logprobs_of(output) for output in found] == stock[1]
        _, model = inside(llm)
        assert model.stats.sparse_tokens == 0
        with pytest.raises(VLLMValidationError, match="fastfill must be true or false"):
            answer(llm, PROMPTS[:1], sparse="no")


def test_mixed_batches_are_single_requests():
    """Dense and sparse, long and short, some decoding while others are read: as each alone."""
    with engine(*folders()) as llm:
        alone = [tokens_of(answer(llm, [ids], sparse=i != 2))[0] for i, ids in enumerate(PROMPTS)]
        params = [
            vllm.SamplingParams(
                temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False, extra_args={"fastfill": i != 2}
            )
            for i in range(len(PROMPTS))
        ]
        together = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
        assert tokens_of(together) == alone
        # One after the other into the running batch: every step decodes some and reads one.
        core = llm.llm_engine
        for index, (ids, param) in enumerate(zip(PROMPTS, params, strict=True)):
            core.add_request(str(index), {"prompt_token_ids": ids}, param)
            core.step()
            core.step()
        done = {}
        while core.has_unfinished_requests():
            done |= {output.request_id: output for output in core.step() if output.finished}
        assert [list(done[str(i)].outputs[0].token_ids) for i in range(len(PROMPTS))] == alone
        two = answer(llm, [PROMPTS[0]], n=2)[0].outputs
        again = answer(llm, [PROMPTS[0]], n=2)[0].outputs
        assert [list(o.token_ids) for o in two] == [list(o.token_ids) for o in again]


@pytest.mark.parametrize(("chunk", "calls"), [(128, 4), (100, 5)])
def test_chunks_change_nothing(chunk, calls):
    """Steps of 100 tokens read 96 = three blocks; the sixth reads 480..500, which fills none."""
    model, artifact = folders()
    ids = PROMPTS[0]
    ((new, logprobs, _),) = expected("llama", artifact, [ids])
    with engine(model, artifact, max_num_batched_tokens=chunk, max_num_seqs=4) as llm:
        (found,) = answer(llm, [ids])
        _, loaded = inside(llm)
        assert loaded.stats.sparse_tokens == 448 and loaded.stats.sparse_calls == calls
    assert tokens_of([found])[0] == new
    assert logprobs_of(found) == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("chunk", [128, 480, 1024])
def test_the_prompts_end_is_dense_and_no_chunks_end(chunk):
    """40 tokens at the end leave 32..448, the same in one step, in four, and where a chunk ends inside the tail."""
    model, artifact = folders()
    ids = PROMPTS[0]
    ((new, logprobs, _),) = expected("llama", artifact, [ids], dense_tail=40)
    with engine(model, artifact, fastfill={"dense_tail": 40}, max_num_batched_tokens=chunk, max_num_seqs=4) as llm:
        (found,) = answer(llm, [ids])
        assert inside(llm)[1].stats.sparse_tokens == 416
    assert tokens_of([found])[0] == new
    assert logprobs_of(found) == pytest.approx(logprobs, abs=1e-4)


def test_chunks_of_several_prompts_change_nothing(stock):
    """All at once through steps of 150 tokens: chunks begin and end where the others leave room, and with a cached prefix."""
    with engine(*folders()) as llm:
        alone = tokens_of(answer(llm, PROMPTS))
        dense = tokens_of(answer(llm, PROMPTS, sparse=False))
        assert dense == stock[0] != alone
    with engine(*folders(), max_num_batched_tokens=150, max_num_seqs=8, enable_prefix_caching=True, block_size=32) as llm:
        _, loaded = inside(llm)
        assert tokens_of(answer(llm, PROMPTS)) == alone
        assert loaded.stats.sparse_tokens == 448 + 64 + 256
        assert tokens_of(answer(llm, PROMPTS)) == alone
        assert tokens_of(answer(llm, PROMPTS, sparse=False)) == dense


def test_prefix_cache_keeps_dense_and_sparse_apart():
    long = PROMPTS[0]
    other = long[:320] + prompt(100, seed=1)
    short = long[:90]  # under the minimum: dense
    with engine(*folders()) as llm:
        sparse, dense = tokens_of(answer(llm, [long]))[0], tokens_of(answer(llm, [long], sparse=False))[0]
        alone = tokens_of(answer(llm, [other]))[0]
        alone_short = tokens_of(answer(llm, [short]))[0]
    assert sparse != dense
    with engine(*folders(), enable_prefix_caching=True, block_size=32) as llm:
        (first,) = answer(llm, [long])
        (hit,) = answer(llm, [long])
        assert tokens_of([first, hit]) == [sparse, sparse]
        assert (first.num_cached_tokens, hit.num_cached_tokens) == (0, 480)
        (off,) = answer(llm, [long], sparse=False)
        (off_hit,) = answer(llm, [long], sparse=False)
        assert tokens_of([off, off_hit]) == [dense, dense]
        assert (off.num_cached_tokens, off_hit.num_cached_tokens) == (0, 480)
        (shared,) = answer(llm, [other])
        assert shared.num_cached_tokens == 320
        assert tokens_of([shared])[0] == alone
        (brief,) = answer(llm, [short])
        assert brief.num_cached_tokens == 64  # of the dense requests
        assert tokens_of([brief])[0] == alone_short


def test_the_tail_is_dense_whatever_the_cache_has():
    """With a tail of 40, 500 tokens leave pages 32..448 sparse; of those a prompt that is the first 320 may take 256, as it
    leaves 32..256 sparse when it is alone. A conversation that goes on after it takes all of its pages, dense tail and all."""
    long, going_on = PROMPTS[0], prompt(320, seed=4)
    short = long[:320]
    with engine(*folders(), fastfill={"dense_tail": 40}) as llm:
        (alone,) = answer(llm, [short])
    with engine(*folders(), fastfill={"dense_tail": 40}, enable_prefix_caching=True, block_size=32) as llm:
        _, loaded = inside(llm)
        answer(llm, [long])
        assert loaded.stats.sparse_tokens == 416
        (found,) = answer(llm, [short])
        assert found.num_cached_tokens == 256 and loaded.stats.sparse_tokens == 416
        assert tokens_of([found]) == tokens_of([alone])
        assert logprobs_of(found) == pytest.approx(logprobs_of(alone), abs=1e-4)
        answer(llm, [going_on])
        before = loaded.stats.sparse_tokens
        (found,) = answer(llm, [going_on + prompt(180, seed=5)])
        assert found.num_cached_tokens == 320 and loaded.stats.sparse_tokens - before == 448 - 320
        assert loaded.stats.dense_because == {}


def test_the_last_layer_leaves_out_what_nobody_reads(monkeypatch):
    """No answer shows it, in chunks neither, of whose last rows vLLM makes logits all the same; a request for its prompt's
    log-probabilities gets them."""
    monkeypatch.setenv("VLLM_RAISE_ON_LOGIT_NANS", "1")
    prompts = [prompt(500), prompt(390, seed=3), prompt(40)]
    with engine(*folders()) as llm:
        wanted = answer(llm, prompts)
    for chunk in (1024, 128):
        with engine(*folders(), max_num_batched_tokens=chunk, max_num_seqs=4) as llm:
            _, loaded = inside(llm)
            found = answer(llm, prompts)
            assert tokens_of(found) == tokens_of(wanted)
            for new, before in zip(found, wanted, strict=True):
                assert logprobs_of(new) == pytest.approx(logprobs_of(before), abs=1e-4)
            assert loaded.stats.unread_tokens == loaded.stats.sparse_tokens > 0
            before = loaded.stats.unread_tokens
            params = vllm.SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0, detokenize=False)
            (shown,) = llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
            lines = [next(iter(line.values())).logprob for line in shown.prompt_logprobs[1:]]
            assert torch.tensor(lines).isfinite().all() and loaded.stats.unread_tokens == before
            answer(llm, prompts[:1])
            assert loaded.stats.unread_tokens > before


def test_preempted_requests_are_read_again_the_same_way(monkeypatch):
    """24 blocks of 32 tokens hold one of these at its end, not two."""
    from vllm.v1.core.sched.scheduler import Scheduler

    prompts, preempted = [prompt(320, seed=2), prompt(321, seed=3)], []
    with engine(*folders()) as llm:
        alone = [tokens_of(answer(llm, [ids], tokens=120))[0] for ids in prompts]
    original = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), original(*a, **k))[1])
    with engine(*folders(), block_size=32, num_gpu_blocks_override=25, max_model_len=512) as llm:
        together = tokens_of(answer(llm, prompts, tokens=120))
    assert preempted
    assert together == alone


def test_a_step_is_planned_without_the_device_and_in_the_order_of_the_runners_batch(monkeypatch):
    """Chunks, decoding, cached prefixes, preemption and requests that come and go; the metadata's own tensors cannot be read.
    What the plan is made of are the scheduler's numbers, row by row of the runner's batch, whose order is another."""
    from vllm.v1.core.sched.scheduler import Scheduler

    sparse, dense = [prompt(320, seed=2), prompt(321, seed=3), prompt(97), prompt(200)], [prompt(300), prompt(60)]
    scheduled, preempted, orders, longest = [], [], set(), 0
    schedule, preempt, plan = Scheduler.schedule, Scheduler._preempt_request, models.SparsePrefill._plan
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), preempt(*a, **k))[1])
    monkeypatch.setattr(Scheduler, "schedule", lambda *a, **k: (scheduled.append(schedule(*a, **k)), scheduled[-1])[1])

    def planned(self, batch, tokens):
        nonlocal longest
        metadata, runner, step = models._metadata(), runner_of(llm), scheduled[-1]
        own = dict(vars(metadata))
        news = {request.req_id: request for request in step.scheduled_new_reqs}
        cached = dict(zip(step.scheduled_cached_reqs.req_ids, step.scheduled_cached_reqs.num_computed_tokens, strict=True))
        ids = runner.input_batch.req_ids
        orders.add(ids == list(step.num_scheduled_tokens))
        new = [step.num_scheduled_tokens[name] for name in ids]
        before = [news[name].num_computed_tokens if name in news else cached[name] for name in ids]
        assert batch.starts.diff().tolist() == new and batch.tokens == sum(new) and batch.longest == max(new)
        assert batch.lengths.tolist() == [a + b for a, b in zip(before, new, strict=True)]
        wanted = {row: len(runner.requests[name].prompt_token_ids) for row, name in enumerate(ids)}
        wanted = {row: length for row, length in wanted.items() if length in map(len, sparse)}
        assert requests.of(self._vllm_config).prompts == wanted
        longest = max(longest, len(wanted))
        vars(metadata).update({name: _Device() for name, value in own.items() if isinstance(value, torch.Tensor)})
        try:
            return plan(self, batch, tokens)
        finally:
            vars(metadata).update(own)

    monkeypatch.setattr(models.SparsePrefill, "_plan", planned)
    limits = {"num_gpu_blocks_override": 25, "max_model_len": 512, "max_num_batched_tokens": 150, "max_num_seqs": 6}
    with engine(*folders(), **limits, enable_prefix_caching=True, block_size=32) as llm:
        core = llm.llm_engine
        for index, ids in enumerate([*sparse, *dense, *sparse]):
            extra = {"fastfill": len(ids) in map(len, sparse)}
            params = vllm.SamplingParams(
                temperature=0.0, max_tokens=10 + 30 * (index % 4), ignore_eos=True, detokenize=False, extra_args=extra
            )
            core.add_request(str(index), {"prompt_token_ids": ids}, params)
            core.step()
        while core.has_unfinished_requests():
            core.step()
        _, loaded = inside(llm)
        # Each prompt at least once, without its head and what fills no block.
        assert loaded.stats.sparse_tokens >= 288 + 288 + 64 + 160 and not loaded.stats.dense_because
    assert preempted and orders == {True, False} and longest > 2


class _Device:
    """In place of a tensor on a device, whose values cost a wait."""

    def __getattribute__(self, name):
        raise AssertionError(f"the device was asked: {name}")


def test_a_prompt_gets_its_block_beside_requests_that_are_answered():
    """36 tokens a step: three answers, and the block of 32 that the fourth needs to go on. With less it would wait for them."""
    short, long = [prompt(20, seed=i) for i in range(3)], prompt(300)
    with engine(*folders(), max_num_batched_tokens=36, max_num_seqs=4) as llm:
        core = llm.llm_engine
        params = vllm.SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, detokenize=False)
        for index, ids in enumerate(short):
            core.add_request(f"short {index}", {"prompt_token_ids": ids}, params)
        core.step(), core.step()
        core.add_request("long", {"prompt_token_ids": long}, params)
        for _ in range(14):  # ten blocks of 32, the first token, and steps that are under way
            core.step()
        scheduler, loaded = inside(llm)
        (request,) = (request for request in scheduler.running if request.num_prompt_tokens == 300)
        assert len(scheduler.running) == 4 and request.num_output_tokens > 0
        assert loaded.stats.sparse_tokens == 256 and not loaded.stats.dense_because
        while core.has_unfinished_requests():
            core.step()


def test_weights_that_come_after_the_start_are_refused_and_those_that_change_are_seen():
    """A reload leaves the engine as it was; FFN weights written to behind our back make prompts dense, and that is counted."""
    model, artifact = folders()
    with engine(model, artifact) as llm:
        before = tokens_of(answer(llm, PROMPTS[:2]))
        dense = tokens_of(answer(llm, PROMPTS[:2], sparse=False))
        _, loaded = inside(llm)
        with pytest.raises(UserError, match="weights of a running engine cannot be replaced"):
            llm.collective_rpc("reload_weights")
        with pytest.raises(UserError, match="weights of a running engine cannot be replaced") as refused:
            loaded.load_weights(vllm_model(seed=1).state_dict().items())
        one_sentence(refused.value)
        assert tokens_of(answer(llm, PROMPTS[:2])) == before
        assert tokens_of(answer(llm, PROMPTS[:2], sparse=False)) == dense
        (counts,) = llm.collective_rpc("fastfill_stats")
        assert counts["dense_because"] == {} and counts["sparse_tokens"] == 2 * (448 + 64)
        with torch.no_grad():
            loaded.model.layers[1].mlp.down_proj.weight.add_(0)
        assert tokens_of(answer(llm, PROMPTS[:1])) == dense[:1]
        (counts,) = llm.collective_rpc("fastfill_stats")
        assert counts["dense_because"] == {steps.NEW_WEIGHTS: 1} and counts["sparse_tokens"] == 2 * (448 + 64)


def test_half_precision_finds_its_artifact_and_nothing_outlives_its_engine():
    """fp16 from a checkpoint in fp32, whose rounding twice is another fingerprint than rounding once. Its 10 bits of mantissa
    leave the first, clear-cut tokens as they are in fp32."""
    model, artifact = folders()
    ((new, _, dense),) = expected("llama", artifact, PROMPTS[:1], tokens=3)
    with engine(model, artifact, dtype="half") as llm:
        _, loaded = inside(llm)
        assert loaded.model.layers[0].self_attn.o_proj.params_dtype == torch.float16
        found = tokens_of(answer(llm, PROMPTS[:1], tokens=3))
        assert loaded.stats.sparse_tokens == 448
        assert found == [new] != [dense]
        seen = [weakref.ref(part) for part in (loaded, requests.of(loaded._vllm_config), loaded._layers[0].ffn.down_t)]
        del loaded
    del llm
    gc.collect()
    assert [ref() for ref in seen] == [None, None, None]


def test_a_prompt_that_comes_in_parts_is_salted_when_it_is_long_enough():
    """Also no request can bring the salt that keeps sparse pages apart."""
    from vllm.v1.request import Request, StreamingUpdate

    with engine(*folders(), enable_prefix_caching=True, block_size=32) as llm:
        scheduler, _ = inside(llm)
        hasher, params = llm.llm_engine.engine_core.engine_core.request_block_hasher, vllm.SamplingParams(max_tokens=4)
        request = Request("a", prompt(90), params, None, cache_salt="fastfill-", resumable=True, block_hasher=hasher)
        scheduler.add_request(request)
        assert request.cache_salt == "fastfill-" and not scheduler._is_salted(request)
        first, request.num_computed_tokens = list(request.block_hashes), 90
        scheduler._update_request_as_session(request, StreamingUpdate(None, prompt(60), 4, 0.0, params))
        assert request.num_prompt_tokens == 150 and scheduler._is_salted(request)
        assert len(request.block_hashes) == 4 and request.block_hashes[:2] != first[:2]


def test_compiled_models_answer_the_same():
    """The same tokens with torch.compile, for both views; log-probabilities within 1e-4 as above."""
    model, artifact = folders()
    wanted = expected("llama", artifact, PROMPTS)
    with engine(model, artifact, enforce_eager=False) as llm:
        found = answer(llm, PROMPTS)
        _, loaded = inside(llm)
        assert not loaded._hidden[0].do_not_compile and loaded.stats.sparse_tokens == 448 + 64 + 256
        off = tokens_of(answer(llm, PROMPTS, sparse=False))
    for output, (new, logprobs, dense), plain in zip(found, wanted, off, strict=True):
        assert tokens_of([output])[0] == new
        assert logprobs_of(output) == pytest.approx(logprobs, abs=1e-4)
        assert plain == dense


def test_one_copy_of_the_weights_answers_the_same(stock):
    """As with two copies, within the same tolerance; dense steps too, which the sparse kernel does then. What is added is the
    predictor and the compensator, and the stock modules are gone."""
    model, artifact = folders()
    wanted = expected("llama", artifact, PROMPTS)
    with engine(model, artifact, fastfill={"one_copy": True}, enforce_eager=False) as llm:
        found, off = answer(llm, PROMPTS), answer(llm, PROMPTS, sparse=False)
        _, loaded = inside(llm)
        assert loaded.stats.sparse_tokens == 448 + 64 + 256
        assert loaded.extra_bytes == 2 * 4 * (8 * (128 + 256) + 256 + 2 * 8 * 128 + 128)
        assert not any("gate_up_proj" in name for name, _ in loaded.named_modules())
    for output, (new, logprobs, _) in zip(found, wanted, strict=True):
        assert tokens_of([output])[0] == new
        assert logprobs_of(output) == pytest.approx(logprobs, abs=1e-4)
    assert tokens_of(off) == stock[0]
    for output, logprobs in zip(off, stock[1], strict=True):
        assert logprobs_of(output) == pytest.approx(logprobs, abs=1e-4)


def halves(attachment):
    """The FFNs of an attached model as two ranks compute them: each selects among its half of the neurons, by its predictor's
    probabilities within that half, and adds its half of the compensator and, if it is the first, down's bias."""
    for module, sparse in zip(attachment.modules, attachment.ffns, strict=True):
        parts, dense = [], sparse.dense
        for rank in range(2):
            own = slice(128 * rank, 128 * (rank + 1))
            predictor, correction, ffn = sparse.predictor, sparse.compensator, sparse.ffn
            scales = ffn.scales and Scales(ffn.scales.gate[own], ffn.scales.up[own], ffn.scales.down)
            rows = [*range(2 * rank, 2 * rank + 2), *range(4 + 2 * rank, 6 + 2 * rank)]
            parts.append(
                SparseFFN(
                    dense=dense,
                    ffn=FFN(
                        ffn.gate[own],
                        ffn.up[own],
                        ffn.down[:, own],
                        ffn.activation,
                        *(None if bias is None else bias[own] for bias in (ffn.gate_bias, ffn.up_bias)),
                        ffn.down_bias if rank == 0 else None,
                        scales,
                        ffn.compute,
                    ),
                    down_t=sparse.down_t[own],
                    kernel=sparse.kernel,
                    kept=(sparse.kept + rank) // 2,
                    predictor=LearnedPredictor(predictor.w_in, predictor.w_out[own], predictor.bias[own]),
                    compensator=Compensator(
                        correction.w_in[rows], correction.w_out[:, rows].contiguous(), correction.bias * (rank == 0), 2
                    ),
                )
            )
        module.forward = lambda x, parts=parts, dense=dense: (
            dense(x) if current_plan.get() is None else parts[0](x) + parts[1](x)
        )


@pytest.mark.parametrize("family", ["phi3", "granite"])
def test_two_ranks_select_each_among_its_own_neurons(family):
    """Tensor parallelism with gloo on one machine, against the transformers engine that does the same in one process. Of Phi-3
    each rank takes its rows of gate and of up from one weight; Granite's have biases, and down's is added once."""
    model, artifact = folders(family)
    with engine(model, artifact, family=family, tensor_parallel_size=2, kv_cache_memory_bytes=2**26) as llm:
        found, off = answer(llm, PROMPTS), tokens_of(answer(llm, PROMPTS, sparse=False))
        counts = llm.collective_rpc("fastfill_stats")
        assert [count["sparse_tokens"] for count in counts] == [448 + 64 + 256] * 2
    wanted = expected(family, artifact, PROMPTS, change=halves)
    whole = expected(family, artifact, PROMPTS)
    assert wanted[0][1] != pytest.approx(whole[0][1], abs=1e-3)  # another selection than that of one rank
    for output, plain, (new, logprobs, dense) in zip(found, off, wanted, strict=True):
        assert tokens_of([output])[0] == new
        assert logprobs_of(output) == pytest.approx(logprobs, abs=1e-4)
        assert plain == dense


def test_the_memory_that_is_added_is_counted():
    """Down transposed, plain gate and up, predictor and compensator; layers are counted, H = 128, F = 256, ranks 8, 4 + 4."""
    with engine(*folders()) as llm:
        _, loaded = inside(llm)
        added = 3 * 128 * 256 + 8 * (128 + 256) + 256 + 2 * 8 * 128 + 128
        assert loaded.extra_bytes == 2 * 4 * added
