// The numbers of one token, and what the teacher would rather have said.

import { asNumber, el, fixed, missing, probability, signed, visible } from "opd/dom.js";

const MINOR = { place: true, "token id": true }; // left out where there is little room

export function tokenDetails(token, response) {
  const facts = [
    ["teacher − student", token.advantage === null ? "not scored" : `${signed(token.advantage, 3)} nats`],
    ["student", `${probability(token.student)} (${fixed(token.student)})`],
    ["teacher", token.teacher === null ? missing : `${probability(token.teacher)} (${fixed(token.teacher)})`],
    ["teacher's rank", token.rank ? String(token.rank) : missing],
    ["teacher's entropy", token.entropy === null ? missing : `≥ ${fixed(token.entropy)} nats`],
    ["place", `${token.position} of ${response.num_response_tokens}`],
    ["token id", String(token.id)],
  ];
  return [
    el("h2", { class: "the-token" }, el("code", {}, visible(token.text))),
    el("dl", {}, facts.map(([name, value]) => el("div", { class: name in MINOR ? "spare" : null }, el("dt", {}, name), el("dd", {}, value)))),
    alternatives(token),
  ];
}

function alternatives(token) {
  if (token.topk.length === 0) return el("p", { class: "note" }, token.teacher === null ? "" : "No alternatives are cached here (score.top_k=0).");
  const shares = token.topk.map((one) => Math.exp(asNumber(one.logprob)));
  const rest = Math.max(0, 1 - shares.reduce((sum, share) => sum + share, 0));
  const row = (text, share, shown, isToken) => el("tr", { class: isToken ? "is-token" : null },
    el("th", { scope: "row" }, el("code", {}, text), isToken ? el("span", { class: "unseen" }, " (sampled)") : null),
    el("td", { class: "bars" }, el("span", { class: "bar", "aria-hidden": "true", vars: { "--part": share } })),
    el("td", { class: "number" }, shown));
  return el("table", { class: "alternatives" },
    el("caption", {}, "What the teacher would say"),
    el("tbody", {},
      token.topk.map((one, place) => row(visible(one.text), shares[place], probability(one.logprob), one.id === token.id)),
      el("tr", { class: "rest" }, el("th", { scope: "row" }, "all others"), el("td", { class: "bars" }, el("span", { class: "bar", "aria-hidden": "true", vars: { "--part": rest } })), el("td", { class: "number" }, probability(Math.log(rest))))));
}
