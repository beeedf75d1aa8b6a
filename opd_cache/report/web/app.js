// The frame around the pages: navigation, theme, and looking for news of a live run.

import { announce, el, heading, linkTo } from "opd/dom.js";
import { redrawCharts } from "opd/charts.js";
import { showHealth } from "opd/health.js";
import { showOverview } from "opd/overview.js";
import { showResponse } from "opd/response.js";
import { showSamples } from "opd/samples.js";
import { Embedded, Served, SourceError } from "opd/sources.js";
import { showSql } from "opd/sql.js";

const NEWS_INTERVAL_MS = 5000;
const THEMES = ["auto", "light", "dark"];
const PAGES = {
  overview: { title: "Overview", show: showOverview },
  samples: { title: "Samples", show: showSamples },
  response: { title: "Tokens", show: showResponse },
  sql: { title: "SQL", show: showSql },
  health: { title: "Health", show: showHealth },
};

const main = document.getElementById("main");
let turn = 0;
let leave = null; // ends what the page that is shown has begun

function place() {
  const [, name = "", query = ""] = location.hash.match(/^#\/([a-z]*)\??(.*)$/) ?? [];
  return { name: name in PAGES ? name : "overview", params: Object.fromEntries(new URLSearchParams(query)) };
}

/** Show what the address says. With `isNews` the reader stays where they are. */
async function show(context, isNews = false) {
  const mine = ++turn;
  const { name, params } = place();
  for (const link of document.querySelectorAll("#pages a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${PAGES[name].title} · ${context.about.runs.join(", ")} · opd-cache`;
  main.setAttribute("aria-busy", "true");
  const ending = new AbortController();
  let content;
  try {
    content = await PAGES[name].show(params, { ...context, signal: ending.signal });
  } catch (error) {
    if (!(error instanceof SourceError)) throw error;
    content = [heading(PAGES[name].title), el("p", { class: "error", role: "alert" }, error.message)];
  }
  if (mine !== turn) return ending.abort();
  leave?.abort();
  leave = ending;
  const scrolled = window.scrollY;
  main.replaceChildren(...[content].flat());
  main.removeAttribute("aria-busy");
  if (isNews) window.scrollTo(0, scrolled);
  else if (context.hasMoved) {
    window.scrollTo(0, 0);
    main.querySelector("h1")?.focus({ preventScroll: true });
  }
  context.hasMoved = true;
}

function navigation() {
  const links = Object.entries(PAGES).map(([name, page]) => el("a", { href: linkTo(name), "data-page": name }, page.title));
  document.getElementById("pages").append(...links);
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
}

function themeButton() {
  const button = document.getElementById("theme");
  const set = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    redrawCharts();
  };
  let theme = THEMES[0];
  try {
    theme = THEMES.find((one) => one === localStorage.getItem("opd-cache-theme")) ?? theme;
  } catch {
    // A file from the disk may have no storage.
  }
  set(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    try {
      localStorage.setItem("opd-cache-theme", theme);
    } catch {
      // As above: the choice then lasts as long as the page.
    }
    set(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
}

/** Look every few seconds whether anything was sealed, has failed or went on, unless the reader has stopped it. */
function watch(context) {
  const box = el("input", { type: "checkbox", checked: true });
  document.getElementById("live").append(el("label", { class: "live" }, box, " live"));
  let before = null;
  const look = async () => {
    if (!box.checked || document.hidden) return;
    try {
      const now = JSON.stringify(await context.source.ask("keys"));
      if (before !== null && now !== before && !isBusy()) {
        await show(context, true);
        announce("The run has gone on; the page is up to date.");
      } else if (before !== null && now !== before) return;
      before = now;
      document.body.classList.remove("lost");
    } catch (error) {
      if (!(error instanceof SourceError)) throw error;
      document.body.classList.add("lost");
    }
  };
  look();
  setInterval(look, NEWS_INTERVAL_MS);
}

/** Whether the reader is in the middle of something that a fresh page would take away. */
function isBusy() {
  return place().name === "sql" || main.contains(document.activeElement?.closest("form, [role=listbox]"));
}

async function start() {
  const data = document.getElementById("data");
  const source = data ? new Embedded(JSON.parse(data.textContent)) : new Served();
  navigation();
  themeButton();
  const about = await source.ask("about");
  const context = { source, about, hasMoved: false };
  document.getElementById("runs").textContent = about.runs.join(" · ");
  document.body.classList.toggle("report", !source.isLive);
  window.addEventListener("hashchange", () => show(context));
  await show(context);
  if (source.isLive) watch(context);
}

start().catch((error) => main.replaceChildren(el("p", { class: "error", role: "alert" }, error.message)));
