// The SQL box. A report has no database: it shows the answers of the ready queries.

import { lineChart } from "opd/charts.js";
import { asNumber, cell, choice, chosenRun, count, el, field, heading, linkTo } from "opd/dom.js";
import { resultTable } from "opd/table.js";

const PLACES = ["position", "episode", "step"]; // a first column by which the others can be drawn
const MAX_CURVES = 4;
const ALL = "all runs, as NAME.view";

export async function showSql(params, context) {
  const { source, about } = context;
  const run = params.run === "" && about.runs.length > 1 ? "" : chosenRun(params, about);
  const answer = el("div", { class: "answer" });
  const status = el("p", { class: "status", role: "status" });
  const ready = about.examples.find((one) => one.name === params.example);
  const box = el("textarea", { id: "sql", name: "sql", rows: "9", spellcheck: "false", autocapitalize: "off", autocomplete: "off", readonly: !source.isLive });
  box.value = params.sql ?? (ready ?? about.examples[0]).sql.trim();

  const answerIt = async () => {
    status.textContent = "Running …";
    status.className = "status";
    try {
      const chosen = form.elements.run?.value ?? run;
      const found = source.isLive ? await source.query(chosen === ALL ? "" : chosen, box.value) : source.answer(chosen, form.elements.example.value || about.examples[0].name);
      if (found.error) throw new Error(found.error);
      status.textContent = said(found);
      answer.replaceChildren(...answerParts(found));
    } catch (error) {
      status.textContent = error.message;
      status.className = "status error";
      answer.replaceChildren();
    }
  };

  const form = el("form", { class: "card sql", "aria-label": "Query" },
    about.runs.length > 1 ? field("Run", choice("run", source.isLive ? [...about.runs, ALL] : about.runs, run || ALL)) : null,
    field("Ready query", examples(about, params.example, source)),
    el("p", { class: "note", id: "answers" }, (ready ?? about.examples[0]).answers),
    el("label", { class: "field", for: "sql" }, el("span", {}, source.isLive ? "One SELECT over the views" : "Its SQL"), box),
    source.isLive ? el("div", { class: "buttons" }, el("button", { type: "submit" }, "Run"), el("span", { class: "note" }, el("kbd", {}, "Ctrl"), " ", el("kbd", {}, "Enter"))) : null,
    status);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    answerIt();
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("change", (event) => {
    if (event.target.name === "example" && event.target.value) {
      const chosen = about.examples.find((one) => one.name === event.target.value);
      box.value = chosen.sql.trim();
      form.querySelector("#answers").textContent = chosen.answers;
      history.replaceState(null, "", linkTo("sql", { run: form.elements.run?.value ?? run, example: chosen.name }));
    }
    if (event.target.name === "example" ? event.target.value : event.target.name === "run" && !source.isLive) answerIt();
  });
  box.addEventListener("input", () => {
    form.elements.example.value = "";
    form.querySelector("#answers").textContent = "";
  });
  if (ready || !source.isLive) await answerIt();
  const note = source.isLive ? "It reads sealed files alone and writes nothing." : "The ready queries as they were answered. opd-cache query and opd-cache serve answer any other.";
  return [heading("SQL"), el("p", { class: "note" }, note), form, answer, reference(about)];
}

function examples(about, chosen, source) {
  const select = choice("example", about.examples.map((one) => one.name), chosen, source.isLive ? "choose one …" : undefined);
  if (!chosen && source.isLive) select.value = about.examples[0].name;
  return select;
}

function said(found) {
  const rows = `${found.more ? "the first " : ""}${count(found.rows.length)} row${found.rows.length === 1 ? "" : "s"}`;
  return [`${rows} in ${found.seconds.toFixed(2)} s`, ...found.left_out].join(" · ");
}

function answerParts(found) {
  if (found.rows.length === 0) return [el("p", { class: "empty" }, "No row.")];
  const table = el("div", { class: "card flush" }, resultTable("Answer", found.columns, found.rows));
  return [drawn(found), table].filter((part) => part !== null);
}

/** Curves of an answer by position, episode or step, where each of these comes once. */
function drawn({ columns, rows }) {
  const x = columns.findIndex((name) => PLACES.includes(name));
  if (x < 0 || rows.length < 3 || new Set(rows.map((row) => row[x])).size < rows.length) return null;
  const isNumeric = (index) => rows.every((row) => row[index] === null || asNumber(row[index]) !== null);
  const drawable = columns.map((_, index) => index).filter((index) => index !== x && isNumeric(index)).slice(0, MAX_CURVES);
  const charts = drawable.map((index) => lineChart({
    title: columns[index], note: "", xLabel: columns[x], format: cell,
    series: [{ label: columns[index], x: rows.map((row) => row[x]), y: rows.map((row) => row[index]), color: 0, dash: 0 }],
  }));
  return charts.length ? el("div", { class: "charts" }, charts.filter((chart) => chart !== null)) : null;
}

function reference(about) {
  const view = ([name, columns]) => el("details", {}, el("summary", {}, el("code", {}, name)), el("dl", { class: "columns" }, columns.map((one) => el("div", {}, el("dt", {}, el("code", {}, one.name)), el("dd", {}, one.doc)))));
  return el("section", { class: "card reference" }, el("h2", {}, "Views and their columns"), Object.entries(about.views).map(view));
}
