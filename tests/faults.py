"""Plants known one-line bugs, one at a time, in a copy of the repository, and demands that a named test catches each.

Run by `make faults`. A fault whose test passes, cannot be found in its file, or whose test does not pass without it, is a failure.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ("csrc", "kernels", "tts_engine", "tests", "setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")


@dataclass(frozen=True)
class Fault:
    """`old` stands once in `file` and is replaced by `new`; `test` is the one that must fail then."""

    name: str
    file: str
    old: str
    new: str
    test: str


FAULTS = [
    Fault("an interval's bounds swapped", "tts_engine/report/intervals.py",
          "return max(0.0, centre - half), min(1.0, centre + half)", "return min(1.0, centre + half), max(0.0, centre - half)",
          "tests/report/test_intervals.py"),
    Fault("a PRM's read position off by one", "tts_engine/prm/families.py",
          "read_at=-1, readout=TwoClassHead()", "read_at=-2, readout=TwoClassHead()",
          "tests/prm/test_families.py::test_markers_stand_at_the_read_positions_and_nowhere_else"),
    Fault("draw numbers restarted", "tts_engine/search/driver.py",
          "self._drawn[branch.identity, lane] = number + 1", "self._drawn[branch.identity, lane] = number",
          "tests/search/test_driver.py::test_each_entry_is_its_parents_next_draw_and_a_second_visit_draws_anew"),
    Fault("the lane left out of a draw's identity", "tts_engine/branch.py",
          "packed = struct.pack(f\"<QI{len(lane)}IQ\", parent, len(lane), *lane, draw)", "packed = struct.pack(\"<QQ\", parent, draw)",
          "tests/search/test_dvts.py::test_subtrees_of_a_uniform_policy_differ"),
    Fault("a freed block reused", "csrc/kv_tree.cpp",
          "    lease.blocks.erase(lease.blocks.begin(), lease.blocks.begin() + keep);\n", "",
          "tests/kv/test_tree.py::test_ten_thousand_operations_agree_with_the_model_and_conserve_blocks"),
    Fault("an idle parent evicted to make room for its child", "csrc/kv_tree.cpp",
          "PinGuard guard(*this, parent);", "PinGuard guard(*this, kNone);",
          "tests/kv/test_tree.py::test_an_idle_parent_survives_the_room_made_for_its_child"),
    Fault("the newest node evicted first", "csrc/kv_tree.cpp",
          "node.last_use = time;", "node.last_use = -time;",
          "tests/kv/test_tree.py::test_eviction_goes_leaf_first_and_oldest_first"),
    Fault("a score stored on the first step of its path", "tts_engine/prm/scorer.py",
          "                context.scores[number] = score", "                context.scores[reading.path[1]] = score",
          "tests/prm/test_scorer.py"),
    Fault("steps behind an evicted one taken for read", "tts_engine/prm/scorer.py",
          "start = self.runner.tree.computed(node)", "start = len(ids) - 1",
          "tests/prm/test_scorer.py"),
    Fault("a token sees the one after it", "tts_engine/attention/per_branch.py",
          "hidden = place[:, None] >= (lens - counts + within + 1)[:, :, None]", "hidden = place[:, None] >= (lens - counts + within + 2)[:, :, None]",
          "tests/attention/test_per_branch.py::test_per_branch_agrees_with_reference"),
    Fault("a window one token too wide", "tts_engine/attention/reference.py",
          "path[-window:]", "path[-window - 1 :]",
          "tests/attention/test_reference.py::test_reference_is_softmax_of_scaled_scores_times_values"),
    Fault("the native kernel lets a token see the one after it", "csrc/tree_attention_kernel.h",
          "segment.start + 1 + query - segment.lo - at", "segment.start + 2 + query - segment.lo - at",
          "tests/attention/test_native.py::test_native_is_as_near_to_the_truth_as_plain_pytorch"),
    Fault("a cut step seen by tokens before the cut", "csrc/tree_plan.cpp",
          "lo + std::max(0, done - start), 0,", "lo, 0,",
          "tests/attention/test_tree_plan.py::test_items_cover_each_token_and_what_it_sees_exactly_once"),
    Fault("a sampler that thinks noise smaller than it is", "csrc/sampling.cpp",
          "* 0.6932f < best", "* 0.5f < best", "tests/test_sampling.py::test_the_fast_sampler_draws_what_the_definition_draws"),
    Fault("RLHFlow's mark left out before the next step", "tts_engine/prm/families.py",
          "\"+\" + to_step", "to_step", "tests/prm/test_scorer.py"),
    Fault("the definition of attention without its scale", "tts_engine/attention/reference.py",
          "(q * keys).sum(-1) / math.sqrt(dim)", "(q * keys).sum(-1)",
          "tests/attention/test_reference.py::test_reference_is_softmax_of_scaled_scores_times_values"),
    Fault("a marker across two tokens overlooked", "tts_engine/steps.py",
          "return self.after[states, tokens]", "return self.after[np.where(states > CLOSED, TEXT, states), tokens]",
          "tests/test_steps.py::test_a_step_closes_where_the_bytes_so_far_hold_the_marker_behind_text"),
    Fault("random numbers that forget the position", "tts_engine/sampling.py",
          "counter[..., 1] = positions.astype(np.uint32)[:, None]", "counter[..., 1] = 0",
          "tests/test_sampling.py::test_any_other_identity_position_or_key_draws_other_numbers"),
    Fault("a preempted draw starts over", "tts_engine/policy.py",
          "self.preemptions += 1", "self.preemptions += 1; del row.tokens[1:]",
          "tests/test_policy.py::test_preempted_draws_resume_behind_the_tokens_they_have"),
    Fault("those below a step that is read in part miss its end", "csrc/tree_plan.cpp",
          "if (own_end < forest.len[node]) {", "if (false) {",
          "tests/attention/test_tree_plan.py::test_items_cover_each_token_and_what_it_sees_exactly_once"),
    Fault("bytes moved by one step too few", "tts_engine/models/linear.py",
          "self._offsets = -128 * scales * sums", "self._offsets = -127 * scales * sums", "tests/models/test_linear.py::test_int8"),
    Fault("a finished branch costs draws", "tts_engine/search/beam_search.py",
          "draws = self.n if self.rules.finished == \"refill\" else self.width * len(live)", "draws = self.n",
          "tests/search/test_beam_search.py::test_paper_finished_branches_compete_and_all_of_them_are_voted"),
    Fault("a vote that counts heads where scores were asked for", "tts_engine/search/voting.py",
          "groups.setdefault(answer, []).append(weight)", "groups.setdefault(answer, []).append(1.0)",
          "tests/search/test_voting.py::test_a_vote_sums_weights_within_each_answer"),
    Fault("plus and minus exchanged", "tts_engine/models/heads.py",
          "self._difference = plus_row.float() - minus_row.float()", "self._difference = minus_row.float() - plus_row.float()",
          "tests/models/test_heads.py::test_pair_head_is_the_softmax_of_two_logits"),
    Fault("a torn last line left in a run", "tts_engine/runs.py",
          "            os.ftruncate(self._file, self._end)\n        except BaseException:", "        except BaseException:",
          "tests/test_runs.py"),
    Fault("two bases taken for one", "tts_engine/tasks/answers.py",
          "for kind in (_WORDS, _NUMERAL))", "for kind in (_WORDS,))",
          "tests/tasks/test_answers.py::test_only_what_needs_no_algebra_is_decided"),
    Fault("an answer that hangs tried with every other", "tts_engine/tasks/grader.py",
          "self._bearable = dict.fromkeys(answers) | self._bearable", "pass",
          "tests/tasks/test_grader.py::test_an_answer_that_hangs_with_everything_is_tried_twice_and_the_others_are_still_compared"),
    Fault("a label that forgives", "tts_engine/tasks/programs.py",
          "labels.append(False)  # what is stated stays stated: hope never comes back", "labels.append(True)",
          "tests/tasks/test_programs.py"),
    Fault("what a step's twin had computed taken for new", "tts_engine/policy.py",
          "step.computed = max(step.computed, step.written)", "step.computed = step.written",
          "tests/test_ledger.py::test_what_a_policy_executed_had_to_be_or_was_wasted_for_a_reason"),
    Fault("rows that fill a batch up left out of its cost", "tts_engine/runner.py",
          "return self._token_flops * beside + (self._read_flops + head_flops) * beside_reads", "return 0",
          "tests/test_ledger.py::test_rows_beside_those_asked_for_are_padding"),
    Fault("a step that is drawn twice useful twice", "tts_engine/ledger.py",
          "again.add(-once.tokens, -once.pairs, -once.reads, -once.read_pairs)", "again = Work()",
          "tests/test_ledger.py::test_a_token_behind_which_more_is_drawn_later_is_read_again"),
    Fault("a row that parts from others without what they had", "tts_engine/policy.py",
          "if len(change.copies):", "if False:",
          "tests/test_engine.py::test_few_rows_change_no_bit"),
    Fault("what rows read together on everybody's account", "tts_engine/accounts.py",
          "row.spared = row.computed = written", "pass",
          "tests/test_ledger.py::test_trajectories_that_come_out_equal_cost_as_much_as_one"),
    Fault("rows that differ kept together", "csrc/rows.cpp",
          "return records_[a].newest == records_[b].newest && why", "return why",
          "tests/test_rows.py::test_rows_are_what_their_definition_says_tick_after_tick"),
    Fault("rows of a packed matrix in another order", "csrc/linear.cpp",
          "(sizeof(W) == 2 ? i % 2 * kLanes + i / 2 : i)", "i", "tests/models/test_linear.py::test_floats"),
    Fault("a row that stopped grows on", "kernels/advance.py",
          "tl.where(goes_on, tl.load(grown + row, mask=live, other=0) + 1, STOPPED)", "tl.load(grown + row, mask=live, other=0) + 1",
          "tests/kernels/test_advance.py"),
    Fault("a step read though its rules drop it", "tts_engine/search/rules.py",
          "return not (self.drop_truncated and child.finish is Finish.LENGTH)", "return True",
          "tests/test_engine.py::test_the_prm_reads_each_distinct_step_that_is_scored_once_and_no_other"),
    Fault("a step of equal siblings read for each of them", "tts_engine/prm/scorer.py",
          "self.paths.setdefault((numbers[-1], step.text), len(self.paths))",
          "self.paths.setdefault((numbers[-1], str(step.identity)), len(self.paths))",
          "tests/prm/test_scorer.py::test_siblings_with_equal_text_are_read_once_though_one_comes_later"),
    Fault("a draw foreseen that is not the next", "tts_engine/search/driver.py",
          "first = self._drawn.get((branch.identity, lane), 0)", "first = 0",
          "tests/search/test_driver.py::test_draws_are_foreseen_as_they_will_be_asked_for"),
    Fault("guesses that outlive their round", "tts_engine/search/driver.py",
          "run.round.over, run.round = True, None", "run.round = None",
          "tests/test_engine.py::test_speculation_changes_no_bit"),
    Fault("a guess that does not give way", "tts_engine/policy.py",
          "elif not self._guesses.give_way():", "else:", "tests/test_engine.py::test_speculation_changes_no_bit"),
    Fault("what was drawn in vain left out of the waste", "tts_engine/guesses.py",
          "row.context.ledger.speculation_flops += row.flops", "pass",
          "tests/test_engine.py::test_what_speculation_wasted_is_told_and_nothing_else_is_more"),
    Fault("pressure below what was reserved", "tts_engine/kv/budget.py",
          "count = min(self._blocks_of_part(1), tree.num_blocks - self._floors[1], tree.available())",
          "count = min(self._blocks_of_part(1), tree.num_blocks - 1, tree.available())", "tests/kv/test_budget.py"),
    Fault("what was reserved forgotten", "tts_engine/kv/budget.py", "self._floors = floors", "pass", "tests/kv/test_budget.py"),
    Fault("a split that waits until a model is short", "tts_engine/engine.py",
          "                        self.budget.expect(self._expected_of_all(running))\n", "",
          "tests/test_engine.py::test_a_policy_beside_an_idle_prm_has_room_for_as_many_searches_as_one_alone"),
    Fault("the cheaper of equal methods passed over", "tts_engine/strategy/choose.py",
          "(solved(run), -flops(run))", "(solved(run), flops(run))", "tests/strategy/test_choose.py"),
    Fault("all searches ended where the logits of one are no numbers", "tts_engine/policy.py",
          "ended = {row.context for row in faulty if row.round is None}", "ended = {row.context for row in rows}",
          "tests/test_engine.py::test_what_goes_wrong_in_one_problem_ends_that_problem_and_no_other"),
    Fault("a score that is no number kept", "tts_engine/prm/scorer.py",
          "if score is None or not 0.0 <= score <= 1.0:", "if score is None:", "tests/prm/test_scorer.py"),
    Fault("a program's error blamed on whoever answers it", "tts_engine/search/driver.py",
          "                self.fail(error)\n", "                raise\n",
          "tests/test_engine.py::test_what_goes_wrong_in_one_problem_ends_that_problem_and_no_other"),
    Fault("a search that is never late", "tts_engine/engine.py",
          "time.perf_counter() - search.started > timeout", "False",
          "tests/test_engine.py::test_what_goes_wrong_in_one_problem_ends_that_problem_and_no_other"),
    Fault("time that others look at a result taken for a search's", "tts_engine/engine.py",
          "other.started += away", "pass", "tests/test_engine.py::test_time_that_a_result_is_looked_at_counts_for_nobody"),
    Fault("limits that a single row lowered for all that come", "tts_engine/policy.py",
          "self.max_rows, self.max_prefill = self._most_rows, MAX_PREFILL", "pass",
          "tests/test_engine.py::test_a_problem_of_which_one_row_is_too_much_for_the_memory_ends_and_the_others_go_on"),
    Fault("blocks that change places without what they hold", "tts_engine/runner.py",
          "            self.cache.copy(moves)\n            self.cache.resize(", "            self.cache.resize(", "tests/test_runner.py"),
    Fault("a layout taken for the next though slots moved", "tts_engine/attention/base.py",
          "self.version == version", "True", "tests/test_engine.py::test_pools_of_another_size_after_every_tick_change_no_bit"),
    Fault("a search given up that keeps its leases", "tts_engine/policy.py",
          "            self.runner.tree.release(lease)\n        self._rows.keep", "            pass\n        self._rows.keep",
          "tests/test_engine.py::test_what_goes_wrong_in_one_problem_ends_that_problem_and_no_other"),
    Fault("every search begun at once", "tts_engine/engine.py",
          " <= self.budget.num_bytes", " >= 0",
          "tests/test_engine.py::test_no_more_searches_are_under_way_than_keep_what_they_need"),
    Fault("a pool resized under a PRM that reads", "tts_engine/engine.py",
          "return not self.policy.under_way and not (self.scorer is not None and self.scorer.under_way)",
          "return not self.policy.under_way", "tests/test_engine.py::test_scores_that_come_ticks_later_change_no_bit"),
    Fault("a search given up while the PRM reads it", "tts_engine/prm/scorer.py",
          "        if self._begun is not None:\n            self.finish()\n        for", "        for",
          "tests/test_engine.py::test_a_search_that_ends_while_the_prm_reads_it_leaves_nothing_behind"),
    Fault("a search begun on what a second interrupt left", "tts_engine/engine.py",
          "        [self._newest] = own\n        self._clear()\n", "        [self._newest] = own\n",
          "tests/test_engine.py::test_interrupts_while_the_first_is_cleared_up_cost_the_next_search_nothing"),
    Fault("a plan that goes by the number of threads", "tts_engine/attention/native.py",
          "split=SPLIT,", "split=64 * torch.get_num_threads(),",
          "tests/attention/test_native.py::test_bits_do_not_depend_on_company_threads_or_the_order_of_rows"),
    Fault("no step read before it is asked for", "tts_engine/engine.py",
          "self.scorer.offer(search.scoring, branch)", "pass", "tests/test_engine.py::test_speculation_changes_no_bit"),
    Fault("graphs kept though they are of other tensors", "tts_engine/graphs.py",
          "if self._version != self._cache.version:", "if False:",
          "tests/test_graphs.py::test_each_size_and_kind_is_captured_once_and_again_for_other_tensors"),
    Fault("draws of one search begun one by one", "tts_engine/policy.py",
          "if free < alike <= self.max_rows:", "if False:",
          "tests/test_engine.py::test_draws_that_are_asked_for_together_begin_together"),
]  # fmt: skip


def main() -> int:
    failures = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy = Path(folder) / "repository"
        copy.mkdir()
        for name in KEPT:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, copy / name)
        (copy / "tts_kernels").symlink_to("kernels")  # else its tests would import the kernels of the repository
        healthy = dict.fromkeys(fault.test for fault in FAULTS)
        if not passes(copy, *healthy):
            print("the named tests do not pass without any fault", flush=True)
            return 1
        for fault in FAULTS:
            verdict = plant(copy, fault)
            failures += verdict != "caught"
            print(f"{verdict:9} {fault.name}  ({fault.test})", flush=True)
    print(f"{len(FAULTS) - failures} of {len(FAULTS)} faults caught")
    return int(failures > 0)


def plant(copy: Path, fault: Fault) -> str:
    """Replace, test, restore; "caught", "missed" or "misplaced"."""
    path = copy / fault.file
    healthy = path.read_text(encoding="utf-8")
    if healthy.count(fault.old) != 1:
        return "misplaced"
    native = path.suffix in (".cpp", ".h")
    try:
        path.write_text(healthy.replace(fault.old, fault.new), encoding="utf-8")
        if native:
            build(copy)
        return "missed" if passes(copy, fault.test) else "caught"
    finally:
        path.write_text(healthy, encoding="utf-8")
        if native:
            build(copy)


def passes(copy: Path, *tests: str) -> bool:
    """Whether the tests run and pass; `python -m` puts the copy before any installed package."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # a usage or collection error catches nothing
        raise SystemExit(f"pytest could not run {' '.join(tests)}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def build(copy: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"], cwd=copy, check=True, capture_output=True
    )


if __name__ == "__main__":
    sys.exit(main())
