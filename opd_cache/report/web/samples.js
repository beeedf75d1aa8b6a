// The table of samples with its filters. The address holds them, so that a view can be kept and sent on.

import { announce, choice, chosenRun, count, el, field, fixed, heading, linkTo } from "opd/dom.js";
import { dataTable } from "opd/table.js";

const FIELDS = ["episode", "prompt", "finish", "teacher", "chosen", "kl_min", "kl_max", "text"];
const KINDS = { worst: "farthest from the teacher", best: "nearest", longest: "longest", random: "random", followed: "a prompt through the episodes" };

export async function showSamples(params, context) {
  const { source, about } = context;
  const run = chosenRun(params, about);
  const choices = await source.ask("choices", { run });
  let asked = { ...params, run };
  const results = el("div", { class: "results" });
  const form = filters(asked, choices, context);

  const update = async (changed) => {
    asked = Object.fromEntries(Object.entries({ ...asked, ...changed }).filter(([, value]) => value !== ""));
    history.replaceState(null, "", linkTo("samples", asked));
    results.setAttribute("aria-busy", "true");
    try {
      const page = await source.ask("samples", asked);
      const focused = document.activeElement?.dataset?.sort ?? document.activeElement?.dataset?.step;
      results.replaceChildren(...resultParts(page, asked, choices, context, update));
      if (focused) results.querySelector(`[data-sort="${focused}"], [data-step="${focused}"]`)?.focus();
      announce(page.total ? `${count(page.total)} samples, from ${page.page * page.page_size + 1}` : "No sample is all of this.");
    } catch (error) {
      results.replaceChildren(el("p", { class: "error", role: "alert" }, error.message));
    }
    results.removeAttribute("aria-busy");
  };

  const read = () => update({ page: "", ...Object.fromEntries(new FormData(form)) });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    read();
  });
  form.addEventListener("change", (event) => {
    if (event.target.name === "run") location.hash = linkTo("samples", { run: event.target.value });
    else read();
  });
  form.addEventListener("reset", () => setTimeout(() => {
    for (const control of form.elements) if (FIELDS.includes(control.name)) control.value = "";
    read();
  }));
  await update({});
  const note = source.isLive ? null : el("p", { class: "note" }, `This report shows some of ${count(source.total(run))} samples: the extremes of every episode, random ones, and a few prompts through all episodes.`);
  return [heading("Samples"), note, form, results].filter((part) => part !== null);
}

function filters(asked, choices, { source, about }) {
  const number = (name, attributes) => el("input", { type: "number", name, value: asked[name] ?? "", ...attributes });
  return el("form", { class: "filters card", "aria-label": "Filters" },
    about.runs.length > 1 ? field("Run", choice("run", about.runs, asked.run)) : null,
    field("Episode", choice("episode", choices.episode, asked.episode, "all")),
    field("Prompt", number("prompt", { min: "0", step: "1", placeholder: "any", class: "narrow" })),
    field("Finish", choice("finish", choices.finish, asked.finish, "any")),
    choices.teacher.length > 1 ? field("Teacher", choice("teacher", choices.teacher, asked.teacher, "any")) : null,
    source.isLive ? null : field("Chosen as", choice("chosen", Object.keys(KINDS), asked.chosen, "any")),
    field("Reverse KL from", number("kl_min", { step: "any", class: "narrow" })),
    field("to", number("kl_max", { step: "any", class: "narrow" })),
    field("Text in prompt or response", el("input", { type: "search", name: "text", value: asked.text ?? "", class: "wide" })),
    el("div", { class: "buttons" }, el("button", { type: "submit" }, "Filter"), el("button", { type: "reset", class: "quiet" }, "Clear")));
}

function resultParts(page, asked, choices, { source }, update) {
  if (page.total === 0) {
    const why = choices.episode.length ? "No sample is all of this." : "No response is scored yet.";
    return [el("p", { class: "empty" }, why)];
  }
  const sort = { key: asked.sort ?? "reverse_kl_mean", descending: (asked.desc ?? "1") === "1" };
  const onSort = (key) => update({ sort: key, desc: sort.key === key && sort.descending ? "0" : "1", page: "" });
  const table = dataTable("Samples", columnsOf(page.rows, asked.run, choices, source), page.rows, { sort, onSort, className: "samples" });
  return [pager(page, update), el("div", { class: "card flush" }, table), pager(page, update)];
}

function columnsOf(rows, run, choices, source) {
  const largest = Math.max(...rows.map((row) => row.reverse_kl_mean ?? 0));
  const place = (row) => ({ run, episode: row.episode, rollout: row.rollout_id, teacher: row.teacher });
  return [
    { key: "rollout_id", label: "Rollout", sortable: true, show: (row) => el("a", { href: linkTo("response", place(row)) }, row.rollout_id) },
    { label: "Prompt and response", class: "texts", show: (row) => [el("span", { class: "prompt" }, row.prompt_text), el("span", { class: "response" }, row.response_text)] },
    { key: "num_response_tokens", label: "Tokens", numeric: true, sortable: true, class: "spare", show: (row) => count(row.num_response_tokens) },
    { key: "finish_reason", label: "Finish", sortable: true, class: "spare", show: (row) => el("span", { class: row.finish_reason === "length" ? "tag warn" : "tag" }, row.finish_reason) },
    { key: "reverse_kl_mean", label: "Reverse KL", numeric: true, sortable: true, show: (row) => divergence(row, largest) },
    { key: "reverse_kl_sum", label: "in all", numeric: true, sortable: true, class: "spare", show: (row) => fixed(row.reverse_kl_sum, 2) },
    { key: "teacher_logprob_min", label: "Worst token", numeric: true, sortable: true, class: "spare", show: (row) => fixed(row.teacher_logprob_min, 2) },
    choices.has_rewards ? { key: "reward", label: "Reward", numeric: true, sortable: true, show: (row) => fixed(row.reward, 2) } : null,
    choices.teacher.length > 1 ? { label: "Teacher", show: (row) => row.teacher } : null,
    source.isLive ? null : { label: "Chosen as", class: "spare", show: (row) => row.chosen },
  ].filter((column) => column !== null);
}

function divergence(row, largest) {
  if (row.error) return el("span", { class: "tag warn", title: row.error }, "not scored");
  const part = Math.max(0, (row.reverse_kl_mean ?? 0) / (largest || 1));
  return [el("span", { class: "bar small", "aria-hidden": "true", vars: { "--part": part } }), fixed(row.reverse_kl_mean)];
}

function pager(page, update) {
  const last = Math.ceil(page.total / page.page_size) - 1;
  const from = page.page * page.page_size;
  const step = (label, number, name) => el("button", { type: "button", class: "quiet", "data-step": name, disabled: number < 0 || number > last, on: { click: () => update({ page: String(number) }) } }, label);
  return el("div", { class: "pager" },
    step("← Previous", page.page - 1, "previous"),
    el("span", {}, `${count(from + 1)} to ${count(Math.min(page.total, from + page.page_size))} of ${count(page.total)}`),
    step("Next →", page.page + 1, "next"));
}
