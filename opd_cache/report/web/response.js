// The token view: a response coloured by teacher − student, the numbers of one token, the prompt through the episodes.

import { barStrip } from "opd/charts.js";
import { asNumber, choice, chosenRun, count, el, field, fixed, heading, linkTo, signed } from "opd/dom.js";
import { tokenDetails } from "opd/token.js";

// As `opd-cache inspect` has them, the good side in two: [below this many nats, class, words].
const BANDS = [
  [-5, "h-worst", "below −5"], [-2, "h-bad", "−5 to −2"], [-0.5, "h-poor", "−2 to −0.5"], [0.5, "h-even", "−0.5 to 0.5"],
  [2, "h-good", "0.5 to 2"], [Infinity, "h-best", "above 2"],
];
const NOTED = -2; // n and p go from one token below this to the next

export async function showResponse(params, context) {
  const { source, about, signal } = context;
  const run = chosenRun(params, about);
  const asked = params.rollout ? { ...params, run } : await firstOf(run, source);
  if (asked === null) return [heading("Tokens"), el("p", { class: "empty" }, "No response is scored yet.")];
  const found = await source.ask("response", asked);
  const tokens = tokensOf(found);
  const place = { run, teacher: found.teacher };
  const details = el("div", { class: "details card", tabindex: "0", role: "region", "aria-label": "The chosen token" });
  const view = tokenList(tokens, (token) => details.replaceChildren(...tokenDetails(token, found)));
  const steps = stepper(found, place, source);
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "[") steps.go(-1);
    if (event.key === "]") steps.go(1);
  }, { signal });
  view.choose(Math.max(0, Number(params.token ?? worstOf(tokens))), false);
  return [
    heading(`Rollout ${found.rollout_id}`, el("a", { href: linkTo("samples", { run, prompt: found.prompt_index }) }, "all samples of this prompt")),
    params.rollout ? null : el("p", { class: "note" }, "Of the last episode's responses the one that is farthest from the teacher. Others are chosen among the samples."),
    facts(found),
    teacherChoice(found, place),
    steps.element,
    el("div", { class: "reading" },
      el("div", { class: "texts" },
        el("section", { class: "card" }, el("h2", {}, `Prompt ${found.prompt_index}`), el("pre", { class: "prompt-text", tabindex: "0" }, found.prompt_text ?? "")),
        el("section", { class: "card" }, el("h2", { id: "response-title" }, "Response"), legend(), view.element, cutNote(found, tokens), strip(tokens, view), keys())),
      details),
  ].filter((part) => part !== null);
}

/** Without a name: the response of the last episode that is farthest from the teacher. */
async function firstOf(run, source) {
  const { episode: episodes } = await source.ask("choices", { run });
  if (episodes.length === 0) return null;
  const { rows } = await source.ask("samples", { run, episode: String(episodes[episodes.length - 1]) });
  const [row] = rows.length ? rows : (await source.ask("samples", { run })).rows;
  return row ? { run, episode: String(row.episode), rollout: row.rollout_id, teacher: row.teacher } : null;
}

function tokensOf({ tokens, texts }) {
  return tokens.id.map((id, position) => {
    const [student, teacher] = [asNumber(tokens.student[position]), asNumber(tokens.teacher[position])];
    return {
      id, position, student, teacher,
      text: texts[id] ?? "",
      advantage: teacher === null ? null : teacher - student,
      rank: tokens.rank[position],
      entropy: tokens.entropy[position],
      topk: tokens.topk_ids[position].map((other, place) => ({ id: other, text: texts[other] ?? "", logprob: asNumber(tokens.topk_logprobs[position][place]) })),
    };
  });
}

function worstOf(tokens) {
  return tokens.reduce((worst, token) => ((token.advantage ?? 0) < (tokens[worst]?.advantage ?? 0) ? token.position : worst), 0);
}

const bandOf = (advantage) => (advantage === null ? "h-none" : BANDS.find(([limit]) => advantage < limit)[1]);

function facts(found) {
  const parts = [
    ["Reverse KL", found.reverse_kl_mean === null ? "not scored" : `${fixed(found.reverse_kl_mean)} nats a token, ${fixed(found.reverse_kl_sum, 2)} in all`],
    ["Tokens", count(found.num_response_tokens)], ["Finish", found.finish_reason], ["Episode", found.episode], ["Policy", found.policy_version],
    ["Teacher", found.teacher], found.reward === null ? null : ["Reward", fixed(found.reward, 2)], found.error === null ? null : ["Error", found.error],
  ].filter((part) => part !== null);
  return el("dl", { class: "facts" }, parts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

function teacherChoice(found, { run }) {
  if (found.teachers.length < 2) return null;
  const select = choice("teacher", found.teachers, found.teacher);
  select.addEventListener("change", () => {
    location.hash = linkTo("response", { run, episode: found.episode, rollout: found.rollout_id, teacher: select.value });
  });
  return field("As scored by", select);
}

function legend() {
  const entries = [...BANDS.map(([, name, words]) => [name, words]), ["h-none", "not scored"]];
  return el("p", { class: "heat-legend" }, el("span", {}, "teacher − student, nats:"), entries.map(([name, words]) => [" ", el("span", { class: `token ${name}` }, words)]));
}

function cutNote(found, tokens) {
  return tokens.length < found.num_response_tokens ? el("p", { class: "note" }, `The first ${count(tokens.length)} of ${count(found.num_response_tokens)} tokens.`) : null;
}

function strip(tokens, view) {
  return barStrip({ label: "Teacher − student log-prob of every token in order; the list above has the same numbers.", values: tokens.map((token) => token.advantage), onChoose: (place) => view.choose(place, true) });
}

function keys() {
  const key = (name) => el("kbd", {}, name);
  return el("p", { class: "note keys" }, key("←"), " ", key("→"), " token · ", key("↑"), " ", key("↓"), " line · ", key("n"), " ", key("p"), " next and previous token below −2 · ", key("["), " ", key("]"), " episode before and after");
}

/** The response as a listbox: one stop of the Tab key, arrows inside. Pointing shows a token, clicking keeps it. */
function tokenList(tokens, show) {
  const options = tokens.map((token) => el("span", {
    class: `token ${bandOf(token.advantage)}`, role: "option", id: `token-${token.position}`, "aria-selected": "false",
    "aria-label": `${token.text.trim() === "" ? "blank" : token.text}, ${token.advantage === null ? "not scored" : signed(token.advantage)}`,
  }, token.text === "" ? "∅" : token.text));
  const element = el("div", { class: "response-text", role: "listbox", tabindex: "0", "aria-labelledby": "response-title" }, options);
  let chosen = 0;
  const choose = (place, isMoved) => {
    if (tokens.length === 0) return;
    options[chosen]?.setAttribute("aria-selected", "false");
    chosen = Math.min(tokens.length - 1, Math.max(0, place));
    options[chosen].setAttribute("aria-selected", "true");
    element.setAttribute("aria-activedescendant", options[chosen].id);
    if (isMoved) options[chosen].scrollIntoView({ block: "nearest" });
    show(tokens[chosen]);
  };
  const under = (event) => options.indexOf(event.target.closest(".token"));
  element.addEventListener("click", (event) => under(event) >= 0 && choose(under(event), true));
  element.addEventListener("mouseover", (event) => under(event) >= 0 && show(tokens[under(event)]));
  element.addEventListener("mouseleave", () => tokens.length && show(tokens[chosen]));
  element.addEventListener("keydown", (event) => {
    const next = event.ctrlKey || event.metaKey || event.altKey ? null : nextPlace(event.key, chosen, tokens, options);
    if (next === null) return;
    event.preventDefault();
    choose(next, true);
  });
  return { element, choose };
}

function nextPlace(key, chosen, tokens, options) {
  const last = tokens.length - 1;
  const noted = (step) => {
    for (let place = chosen + step; place >= 0 && place <= last; place += step) if ((tokens[place].advantage ?? 0) < NOTED) return place;
    return chosen;
  };
  switch (key) {
    case "ArrowRight": return Math.min(last, chosen + 1);
    case "ArrowLeft": return Math.max(0, chosen - 1);
    case "ArrowDown": return onOtherLine(options, chosen, 1);
    case "ArrowUp": return onOtherLine(options, chosen, -1);
    case "Home": return 0;
    case "End": return last;
    case "n": return noted(1);
    case "p": return noted(-1);
    default: return null;
  }
}

/** The token of the next line that is nearest below or above. */
function onOtherLine(options, chosen, step) {
  const from = options[chosen].getBoundingClientRect();
  let best = chosen;
  let line = null;
  for (let place = chosen + step; place >= 0 && place < options.length; place += step) {
    const box = options[place].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) >= 4) break;
    const isNearer = Math.abs(box.left - from.left) < Math.abs(options[best].getBoundingClientRect().left - from.left);
    if (best === chosen || isNearer) best = place;
  }
  return best;
}

/** Links to all samples of the prompt, episode by episode; go(±1) follows the episode before or after. */
function stepper(found, { run }, source) {
  const isHere = (one) => one.episode === found.episode && one.rollout_id === found.rollout_id;
  const here = found.siblings.find(isHere);
  const address = (one) => linkTo("response", { run, episode: one.episode, rollout: one.rollout_id, teacher: one.teacher });
  const neighbour = (step) => {
    const others = found.siblings.filter((one) => (one.episode - found.episode) * step > 0);
    const nearest = Math.min(...others.map((one) => Math.abs(one.episode - found.episode)));
    const near = others.filter((one) => Math.abs(one.episode - found.episode) === nearest);
    return near.find((one) => one.sample_index === here?.sample_index) ?? near[0];
  };
  const go = (step) => {
    const other = neighbour(step);
    if (other) location.hash = address(other);
  };
  if (found.siblings.length < 2) return { element: el("p", { class: "note" }, `This prompt has no other sample in this ${source.isLive ? "run" : "report"}.`), go };
  const button = (label, step) => el("button", { type: "button", class: "quiet", disabled: !neighbour(step), on: { click: () => go(step) } }, label);
  const entry = (one) => {
    const words = [el("b", {}, `episode ${one.episode}`), one.sample_index ? ` #${one.sample_index}` : "", ` ${fixed(one.reverse_kl_mean, 2)}`];
    return el("li", {}, el("a", { href: address(one), "aria-current": isHere(one) ? "true" : null }, words));
  };
  const list = el("ol", {}, found.siblings.map(entry));
  requestAnimationFrame(() => {
    // Not by scrollIntoView, which would also move where the Tab key goes on from.
    const current = list.querySelector("[aria-current]");
    if (current) list.scrollLeft = current.offsetLeft - list.offsetLeft - (list.clientWidth - current.offsetWidth) / 2;
  });
  const element = el("nav", { class: "stepper", "aria-label": "This prompt in other episodes; numbers are reverse KL in nats a token" }, button("← Before", -1), list, button("After →", 1));
  return { element, go };
}
