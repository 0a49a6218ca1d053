"""Planning with recorded traffic: the trace format, the figures, the plot, and the bytes of a model's blocks."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from zif.contract import (
    EngineConfig,
    FullAttentionSpec,
    LatentAttentionSpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
    StateTensor,
)
from zif.errors import ConfigError
from zif.simulation import (
    CostModel,
    TraceReplay,
    TraceRequest,
    dense_layout,
    model_arena,
    plain_arena,
    read_trace,
    write_plot,
)

CONFIG = EngineConfig(4096, 8, 64)
COST = CostModel(step_s=1.0, token_s=0.0, context_token_s=0.0)


def replay(trace, num_blocks=64, config=CONFIG, cost=COST, max_steps=None):
    return TraceReplay(config, plain_arena(num_blocks, 4), cost).run(trace, max_steps)


class TestTrace:
    def test_lines_become_requests_in_order_of_arrival(self, tmp_path):
        path = tmp_path / "trace.jsonl"
        late = {"arrival_s": 2, "prompt_tokens": 5, "output_tokens": 1, "prefix_id": "a", "prefix_tokens": 4}
        early = {"arrival_s": 0.5, "prompt_tokens": 3, "output_tokens": 2, "tenant": "t", "priority": -1}
        path.write_text(f"{json.dumps(late)}\n\n{json.dumps(early)}\n")
        assert read_trace(path) == [
            TraceRequest(0.5, 3, 2, tenant="t", priority=-1),
            TraceRequest(2, 5, 1, prefix_id="a", prefix_tokens=4),
        ]

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("{", "line 1"),
            ("[1]", "no JSON object"),
            ('{"arrival_s": 0, "prompt_tokens": 1}', "'output_tokens' is missing"),
            ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "color": 2}', "'color' is no field"),
            ('{"arrival_s": -1, "prompt_tokens": 1, "output_tokens": 1}', "arrival_s=-1"),
            ('{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}', "arrival_s=nan"),
            ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens=0"),
            ('{"arrival_s": 0, "prompt_tokens": 1.5, "output_tokens": 1}', "prompt_tokens=1.5"),
            ('{"arrival_s": 0, "prompt_tokens": true, "output_tokens": 1}', "prompt_tokens=True"),
            ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "tenant": 3}', "tenant=3"),
            ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "prefix_id": "a"}', "go together"),
            (
                '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "prefix_id": "a", "prefix_tokens": 2}',
                "exceeds prompt_tokens=1",
            ),
        ],
    )
    def test_a_wrong_line_is_refused_with_its_number(self, tmp_path, line, complaint):
        path = tmp_path / "trace.jsonl"
        path.write_text(line)
        with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
            read_trace(path)
        assert "line 1" in str(caught.value)

    def test_an_empty_or_absent_file_is_refused(self, tmp_path):
        (tmp_path / "empty").write_text("\n")
        for name in ("empty", "absent"):
            with pytest.raises(ConfigError, match=name):
                read_trace(tmp_path / name)


class TestFigures:
    def test_one_request_takes_one_step_per_token(self):
        report = replay([TraceRequest(10.0, 8, 3)])
        assert (report.num_steps, report.output_tokens, report.num_unfinished) == (3, 3, 0)
        assert report.duration_s == 13.0
        assert (report.queue_p50_s, report.first_token_p50_s) == (0.0, 1.0)

    def test_the_cost_model_counts_steps_tokens_and_context(self):
        report = replay([TraceRequest(0.0, 8, 2)], cost=CostModel(1.0, 10.0, 100.0))
        assert report.duration_s == (1 + 80 + 800) + (1 + 10 + 900)

    def test_a_shared_prefix_is_found_by_whole_blocks_and_only_inside_a_tenant(self):
        shared = TraceRequest(0.0, 12, 1, prefix_id="a", prefix_tokens=10)
        later = replace(shared, arrival_s=5.0)
        assert replay([shared, later]).cached_tokens == 8
        assert replay([shared, later]).hit_rate == 8 / 24
        assert replay([shared, replace(later, tenant="x")]).cached_tokens == 0
        assert replay([shared, replace(later, prefix_id="b")]).cached_tokens == 0
        assert replay([shared, later], config=replace(CONFIG, enable_prefix_caching=False)).cached_tokens == 0

    def test_who_waits_for_a_place_queues(self):
        trace = [TraceRequest(0.0, 4, 5), TraceRequest(0.0, 4, 5)]
        report = replay(trace, config=replace(CONFIG, max_num_seqs=1))
        assert (report.queue_p50_s, report.queue_p99_s) == (0.0, 5.0)

    def test_what_can_never_fit_is_counted_and_the_rest_is_served(self):
        report = replay([TraceRequest(0.0, 5000, 1), TraceRequest(0.0, 300, 1), TraceRequest(0.0, 4, 1)])
        assert (report.num_requests, report.num_refused, report.output_tokens) == (3, 2, 1)

    def test_a_step_limit_leaves_requests_unfinished(self):
        report = replay([TraceRequest(0.0, 4, 50), TraceRequest(1e6, 4, 1)], max_steps=10)
        assert (report.num_steps, report.num_unfinished) == (10, 2)

    def test_too_little_memory_preempts(self):
        config = replace(CONFIG, expected_output_percent=0)
        report = replay([TraceRequest(0.0, 8, 60) for _ in range(4)], num_blocks=20, config=config)
        assert report.num_preemptions > 0
        assert report.num_unfinished == 0
        assert report.peak_owned_share > 0.8

    def test_the_record_of_usage_is_bounded(self):
        report = replay([TraceRequest(0.0, 4, 3000)], num_blocks=1000)
        assert 100 < len(report.usage) < 512
        times = [sample.time_s for sample in report.usage]
        assert times == sorted(times)
        assert times[-1] > 0.9 * report.duration_s

    def test_the_same_trace_gives_the_same_report(self):
        trace = [TraceRequest(0.1 * i, 9, 4, prefix_id="a", prefix_tokens=5) for i in range(20)]
        assert replay(trace) == replay(trace)


class TestPlot:
    def test_a_page_is_self_contained_and_its_drawing_is_sound(self, tmp_path):
        report = replay([TraceRequest(0.0, 8, 30)])
        write_plot(report, tmp_path / "plot.html")
        write_plot(report, tmp_path / "plot.svg")
        text = (tmp_path / "plot.html").read_text()
        assert "8 prompt tokens" in text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        root = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
        shapes = [element for element in root if element.get("points")]
        assert len(shapes) == 4
        assert all(len(element.get("points").split()) >= 30 for element in shapes)

    def test_another_form_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"\.html and \.svg"):
            write_plot(replay([TraceRequest(0.0, 8, 1)]), tmp_path / "plot.png")


class TestBytes:
    def test_blocks_take_what_their_kind_keeps(self):
        assert dense_layout(FullAttentionSpec((0, 1), 4, 64, 16, "bfloat16")).block_bytes == 2 * 2 * 4 * 64 * 16 * 2
        assert dense_layout(LatentAttentionSpec((0, 1), 512, 64, 16, "bfloat16")).block_bytes == 2 * 576 * 16 * 2
        state = RecurrentStateSpec(
            (0, 1, 2), (StateTensor("conv", (8, 3), "bfloat16"), StateTensor("state", (4, 4), "float32")), 16, "float32"
        )
        assert dense_layout(state).block_bytes == 3 * (8 * 3 * 2 + 4 * 4 * 4)

    def test_a_models_arena_stays_inside_its_bytes(self):
        specs = (
            FullAttentionSpec((0,), 4, 64, 16, "bfloat16"),
            SlidingWindowSpec((1, 2), 4, 64, 16, "bfloat16", window=128),
        )
        arena = model_arena(specs, 1 << 24)
        assert 0.8 * (1 << 24) < arena.num_bytes <= 1 << 24
        with pytest.raises(ConfigError, match="kv_bytes"):
            model_arena(specs, 1000)
