// The overview: how far the runs have come, and their curves in the same plots.

import { lineChart } from "opd/charts.js";
import { cell, count, el, fixed, heading, missing, percent, short } from "opd/dom.js";
import { dataTable } from "opd/table.js";

const nats = (value) => fixed(value, Math.abs(value) >= 10 ? 1 : Math.abs(value) >= 0.1 ? 2 : 3);

export async function showOverview(_, { source }) {
  const runs = await source.ask("overview");
  const charts = chartsOf(runs).map(lineChart).filter((chart) => chart !== null);
  const empty = el("p", { class: "empty" }, "Nothing is sealed yet. The curves come with the first episode.");
  return [
    heading("Overview"),
    runs.length === 1 ? tiles(runs[0]) : comparison(runs),
    charts.length ? el("div", { class: "charts" }, charts) : empty,
    el("section", { class: "card" }, el("h2", {}, "Cost by stage"), el("p", { class: "note" }, "Seconds that were noted for every shard and step; bytes of the published shards."), runs.map((run) => costs(run, runs.length > 1))),
  ];
}

/** Rows of a dict of lists where a condition holds, as {x, y}. */
function pick(columns, x, y, holds = () => true) {
  const rows = (columns[x] ?? []).map((_, row) => row).filter((row) => columns[x][row] !== null && holds(row));
  return { x: rows.map((row) => columns[x][row]), y: rows.map((row) => columns[y][row]) };
}

const distinct = (values) => [...new Set(values ?? [])];

/** With one run a colour a series; with several a colour a run and a dash a series. */
function styled(runs, named) {
  return runs.flatMap((run, number) => named(run).map((one, index) => ({
    ...one,
    label: runs.length > 1 ? `${run.name}: ${one.label}` : one.label,
    color: runs.length > 1 ? number : one.color ?? index,
    dash: runs.length > 1 ? index : one.dash ?? 0,
  })));
}

function chartsOf(runs) {
  const series = (named) => styled(runs, named);
  return [
    { title: "Accuracy", note: "Share of held-out prompts that are answered right, by policy version.", xLabel: "policy version", format: percent, isShare: true, series: series(accuracies) },
    { title: "Reverse KL", note: "Nats a token, lower is nearer the teacher: on each episode's rollouts, and on held-out prompts.", xLabel: "episode", format: nats, fromZero: true, series: series(divergences) },
    { title: "Reverse KL by step", note: "Nats a token on the batch of every optimizer step.", xLabel: "step", format: nats, fromZero: true, series: series((run) => [{ label: "reverse KL", ...pick(run.steps, "step", "reverse_kl") }]) },
    { title: "Entropy", note: "Nats: the student's next-token distribution in every step.", xLabel: "step", format: nats, fromZero: true, series: series((run) => [{ label: "student", ...pick(run.steps, "step", "entropy") }]) },
    { title: "Teacher's entropy", note: "Nats, a lower bound from its cached top-k, on some responses of every episode.", xLabel: "episode", format: nats, fromZero: true, series: series((run) => byTeacher(run.teacher_entropy, "entropy")) },
    { title: "Response length", note: "Tokens: the mean, and what 95 of 100 responses stay within.", xLabel: "episode", format: short, fromZero: true, series: series((run) => [{ label: "mean", ...pick(run.episodes, "episode", "mean_tokens") }, { label: "95th percentile", ...pick(run.episodes, "episode", "p95_tokens") }]) },
    { title: "Truncated", note: "Share of responses that were cut before their EOS.", xLabel: "episode", format: percent, isShare: true, fromZero: true, series: series((run) => [{ label: "truncated", ...pick(run.episodes, "episode", "truncated_share") }]) },
    { title: "Reward", note: "Mean task reward of every episode's rollouts.", xLabel: "episode", format: nats, series: series((run) => byTeacher(run.scored, "reward").slice(0, 1)) },
    { title: "Speed", note: "Response tokens a second and process, by stage.", xLabel: "episode", format: short, fromZero: true, series: series((run) => distinct(run.speed.stage).map((stage) => ({ label: stage, ...pick(run.speed, "episode", "tokens_per_s", (row) => run.speed.stage[row] === stage) }))) },
  ];
}

function byTeacher(columns, key) {
  const teachers = distinct(columns.teacher);
  return teachers.map((teacher) => ({
    label: teachers.length > 1 ? teacher : key.replace("_", " "),
    ...pick(columns, "episode", key, (row) => columns.teacher[row] === teacher),
  }));
}

function accuracies(run) {
  const evals = run.evals;
  const versions = distinct(evals.policy_version).filter((version) => version !== null);
  const subjects = distinct(evals.subject).filter((subject) => subject.startsWith("teacher="));
  return distinct(evals.mode).flatMap((mode, color) => {
    const student = { label: mode, color, ...pick(evals, "policy_version", "accuracy", (row) => evals.mode[row] === mode) };
    const teachers = subjects.map((subject) => {
      const row = evals.subject.findIndex((one, index) => one === subject && evals.mode[index] === mode);
      return { label: subjects.length > 1 ? `${subject.slice("teacher=".length)}, ${mode}` : `teacher, ${mode}`, color, dash: 1, x: versions, y: versions.map(() => (row < 0 ? null : evals.accuracy[row])) };
    });
    return [student, ...teachers];
  });
}

function divergences(run) {
  const rollouts = byTeacher(run.scored, "reverse_kl").map((one) => ({ ...one, label: one.label === "reverse kl" ? "rollouts" : `rollouts, ${one.label}` }));
  const heldOut = pick(run.evals, "policy_version", "reverse_kl", (row) => run.evals.reverse_kl[row] !== null);
  return [...rollouts, { label: "held-out", ...heldOut }];
}

function firstAndLast({ y }) {
  const known = y.filter((value) => value !== null);
  return known.length ? [known[0], known[known.length - 1]] : [null, null];
}

function accuracyOf(run, mode) {
  return firstAndLast(pick(run.evals, "policy_version", "accuracy", (row) => run.evals.mode[row] === mode));
}

function figures(run) {
  const held = firstAndLast(pick(run.evals, "policy_version", "reverse_kl", (row) => run.evals.reverse_kl[row] !== null));
  const rolled = firstAndLast(pick(run.scored, "episode", "reverse_kl"));
  const bytes = run.bytes.rollouts + run.bytes.scores;
  return {
    episodes: { label: "Episodes", now: `${run.episodes_done} of ${run.num_episodes}` },
    tokens: { label: "Response tokens", now: count(run.response_tokens) },
    greedy: change("Greedy accuracy", accuracyOf(run, "greedy"), percent),
    sampled: change("Sampled accuracy", accuracyOf(run, "sampled"), percent),
    rolled: change("Reverse KL, rollouts", rolled, nats),
    held: change("Reverse KL, held-out", held, nats),
    truncated: change("Truncated", firstAndLast(pick(run.episodes, "episode", "truncated_share")), percent),
    cache: { label: "Cache", now: run.response_tokens ? `${fixed(bytes / run.response_tokens, 1)} B` : missing, before: "a response token" },
  };
}

function change(label, [first, last], format) {
  return { label, now: last === null ? missing : format(last), before: first === null || first === last ? "" : `from ${format(first)}` };
}

function tiles(run) {
  const shown = Object.values(figures(run)).filter((one) => one.now !== missing);
  return el("dl", { class: "tiles" }, shown.map((one) => el("div", {}, el("dt", {}, one.label), el("dd", {}, el("b", {}, one.now), one.before ? el("span", {}, one.before) : null))));
}

function comparison(runs) {
  const rows = runs.map((run) => ({ name: run.name, ...figures(run) }));
  const columns = [{ label: "Run", show: (row) => row.name }, ...Object.keys(figures(runs[0])).map((key) => ({
    label: rows[0][key].label, numeric: true, show: (row) => [row[key].now, row[key].before?.startsWith("from") ? el("span", { class: "before" }, ` ${row[key].before}`) : null],
  }))];
  return el("section", { class: "card" }, el("h2", {}, "Runs"), dataTable("Runs side by side", columns, rows));
}

function costs(run, isNamed) {
  const rows = (run.cost.stage ?? []).map((stage, row) => Object.fromEntries(Object.keys(run.cost).map((key) => [key, run.cost[key][row]])));
  const largest = Math.max(...rows.map((row) => row.share ?? 0), 0);
  const bar = (row) => el("span", { class: "bar", "aria-hidden": "true", vars: { "--part": largest ? (row.share ?? 0) / largest : 0 } });
  const columns = [
    { label: "Stage", show: (row) => row.stage },
    { label: el("span", { class: "unseen" }, "Share as a bar"), class: "bars", show: bar },
    { label: "Seconds", numeric: true, show: (row) => fixed(row.seconds, 1) },
    { label: "Share", numeric: true, show: (row) => percent(row.share) },
    { label: "Tokens", numeric: true, show: (row) => count(row.tokens) },
    { label: "Bytes", numeric: true, show: (row) => (row.bytes === null ? missing : short(row.bytes)) },
  ];
  const title = `Cost by stage of ${run.name}`;
  return rows.length ? [isNamed ? el("h3", {}, run.name) : null, dataTable(title, columns, rows)] : el("p", { class: "empty" }, `${cell(run.name)}: nothing is noted yet.`);
}
