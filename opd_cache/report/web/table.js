// Tables with a caption, right-aligned numbers and headers that sort.

import { cell, el } from "opd/dom.js";

/**
 * columns: {key, label, numeric, show(row), sortable, class}; show gives text or a node. sort: {key, descending} and
 * onSort(key) where the headers sort.
 */
export function dataTable(caption, columns, rows, { sort = null, onSort = null, className = "" } = {}) {
  const head = el("tr", {}, columns.map((column) => header(column, sort, onSort)));
  const body = rows.map((row) => el("tr", {}, columns.map((column, index) => tableCell(column, row, index === 0))));
  const table = el("table", { class: className }, el("caption", { class: "unseen" }, caption), el("thead", {}, head), el("tbody", {}, body));
  return el("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" }, table);
}

function header(column, sort, onSort) {
  const classes = [column.numeric ? "number" : "", column.class ?? ""].join(" ").trim();
  if (!onSort || !column.sortable) return el("th", { scope: "col", class: classes }, column.label);
  const isSorted = sort.key === column.key;
  const direction = sort.descending ? "descending" : "ascending";
  const arrow = el("span", { class: "arrow", "aria-hidden": "true" }, isSorted ? (sort.descending ? "▼" : "▲") : "");
  const button = el("button", { type: "button", "data-sort": column.key, on: { click: () => onSort(column.key) } }, column.label, arrow);
  return el("th", { scope: "col", class: classes, "aria-sort": isSorted ? direction : "none" }, button);
}

function tableCell(column, row, isFirst) {
  const classes = [column.numeric ? "number" : "", column.class ?? ""].join(" ").trim();
  return el(isFirst ? "th" : "td", { scope: isFirst ? "row" : null, class: classes }, column.show ? column.show(row) : cell(row[column.key]));
}

/** A table of what a query gave: lists of values. */
export function resultTable(caption, names, rows) {
  const columns = names.map((label, index) => ({
    label,
    numeric: rows.length > 0 && rows.every((row) => typeof row[index] === "number" || row[index] === null),
    show: (row) => cell(row[index]),
  }));
  return dataTable(caption, columns, rows, { className: "result" });
}
