// What its checks warn of, what is missing, has failed, was slow, or lies where no view reads it.

import { count, el, fixed, heading, missing } from "opd/dom.js";
import { dataTable } from "opd/table.js";

const MOST_NUMBERS = 12;

export async function showHealth(_, { source }) {
  const runs = await source.ask("health");
  return [heading("Health"), runs.map((run) => runHealth(run, runs.length > 1))].flat(2);
}

function runHealth(run, isNamed) {
  const problems = run.fault !== null || run.warnings.length + run.gaps.length + run.failed.length > 0;
  const summary = problems ? `${count(run.warnings.length)} warnings, ${count(run.gaps.length)} stages with gaps, ${count(run.failed.length)} failed shards` : `All ${count(run.shards)} shards of what has begun are there and sealed.`;
  return [
    isNamed ? el("h2", { class: "run-name" }, run.name) : null,
    run.fault === null ? null : el("p", { class: "error", role: "alert" }, run.fault),
    el("p", { class: problems ? "verdict warn" : "verdict good" }, summary),
    part("Warnings", "Figures beyond the recipe's health thresholds, as each stage was completed; the command shows where they come from.", warningTable(run)),
    part("Gaps", "Stages that lack shards or their seal. A stage that is running shows up here, too; the stage's command makes what is missing.", gapTable(run)),
    part("Failed shards", "They failed for good; the stage's command tries them again.", failedTable(run)),
    part("Slow shards", "At least twice the time a token of their stage's median.", slowTable(run), run.with_seconds === 0 ? "No log says how long shards took." : null),
    part("Quarantined and moved aside", "Nothing reads these.", list(run.moved_aside)),
    part("Left out of the views", "What is there, but not sealed.", list(run.left_out)),
    part("Policies removed by the retention rule", "learn.keep_policies gave them up; their responses, scores and steps are all there.", list(run.removed_policies.map((one) => `policy ${one.policy_version}, ${count(one.bytes)} bytes`))),
  ].filter((one) => one !== null);
}

function part(title, note, content, otherwise = null) {
  const shown = content ?? el("p", { class: "empty" }, otherwise ?? "None.");
  return el("section", { class: "card" }, el("h2", {}, title), el("p", { class: "note" }, note), shown);
}

function list(texts) {
  return texts.length ? el("ul", { class: "plain" }, texts.map((text) => el("li", {}, text))) : null;
}

function gapTable({ name, gaps }) {
  const columns = [
    { label: "Episode", show: (row) => String(row.episode) },
    { label: "Stage", show: stageOf },
    { label: "There", numeric: true, show: (row) => `${row.num_shards - row.missing.length} of ${row.num_shards}` },
    { label: "Missing", show: (row) => numbers(row.missing) },
    { label: "Seal", show: (row) => (row.is_sealed ? "sealed, but shards are gone" : "not sealed") },
  ];
  return gaps.length ? dataTable(`Gaps of ${name}`, columns, gaps) : null;
}

function warningTable({ name, warnings }) {
  const columns = [
    { label: "Episode", show: (row) => String(row.episode) },
    { label: "Stage", show: stageOf },
    { label: "Warning", class: "texts", show: (row) => row.text },
    { label: "See", show: (row) => el("code", {}, row.command) },
  ];
  return warnings.length ? dataTable(`Warnings of ${name}`, columns, warnings) : null;
}

function stageOf(row) {
  return row.teacher === null ? row.stage : `${row.stage}, ${row.teacher}`;
}

function numbers(shards) {
  const more = shards.length - MOST_NUMBERS;
  return shards.length ? shards.slice(0, MOST_NUMBERS).join(", ") + (more > 0 ? ` and ${more} more` : "") : missing;
}

function failedTable({ name, failed }) {
  const columns = [
    { label: "Shard", show: (row) => row.file },
    { label: "Error", class: "texts", show: (row) => `${row.error}: ${row.message}` },
    { label: "When", show: (row) => row.time },
    { label: "Where", show: (row) => `${row.host}, process ${row.pid}` },
  ];
  return failed.length ? dataTable(`Failed shards of ${name}`, columns, failed) : null;
}

function slowTable({ name, slow }) {
  const columns = [
    { label: "Shard", show: (row) => row.file },
    { label: "Times slower", numeric: true, show: (row) => fixed(row.times_slower, 1) },
    { label: "Tokens a second", numeric: true, show: (row) => count(row.tokens_per_s) },
    { label: "Median", numeric: true, show: (row) => count(row.median_tokens_per_s) },
    { label: "Host", show: (row) => row.host ?? missing },
    { label: "Engine", show: (row) => row.engine ?? missing },
  ];
  return slow.length ? dataTable(`Slow shards of ${name}`, columns, slow) : null;
}
