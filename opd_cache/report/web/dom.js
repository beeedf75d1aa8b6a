// Elements, numbers and texts. Texts reach the page as text nodes only, never as markup.

/** An element. Attributes: class, on (listeners), vars (CSS custom properties), others as they are; null leaves one out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "vars") for (const [property, set] of Object.entries(value)) element.style.setProperty(property, set);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** JSON knows no infinities: they come as texts. */
export function asNumber(value) {
  if (value === "inf") return Infinity;
  if (value === "-inf") return -Infinity;
  return typeof value === "number" ? value : null;
}

export const missing = "–";

export function fixed(value, digits = 3) {
  const number = asNumber(value);
  if (number === null) return missing;
  if (!Number.isFinite(number)) return number > 0 ? "∞" : "−∞";
  return number.toFixed(digits).replace("-", "−");
}

export function signed(value, digits = 2) {
  const text = fixed(value, digits);
  return asNumber(value) > 0 ? `+${text}` : text;
}

export const count = (value) => (asNumber(value) === null ? missing : Math.round(value).toLocaleString("en"));
export const percent = (value, digits = 1) => (asNumber(value) === null ? missing : `${fixed(value * 100, digits)} %`);

/** 214000 → 214k */
export function short(value) {
  const number = asNumber(value);
  if (number === null) return missing;
  for (const [limit, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(number) >= limit) return `${Number((number / limit).toPrecision(3))}${suffix}`;
  }
  return String(Number(number.toPrecision(3)));
}

/** Six significant digits, as the tables of `opd-cache query`. */
export function cell(value) {
  if (value === null || value === undefined) return missing;
  if (typeof value === "number") return String(Number.isInteger(value) ? value : Number(value.toPrecision(6))).replace("-", "−");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** A probability from a log-prob, short. */
export function probability(logprob) {
  const number = asNumber(logprob);
  if (number === null) return missing;
  const share = Math.exp(number);
  return share >= 0.001 || share === 0 ? percent(share, share >= 0.1 ? 1 : 2) : `${share.toExponential(0).replace("-", "−")}`;
}

/** What cannot be seen in a token's text, made visible on one line. */
export function visible(text) {
  return text === "" ? "∅" : text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** A labelled control of a form. */
export function field(label, control) {
  return el("label", { class: "field" }, el("span", {}, label), control);
}

export function choice(name, options, chosen, any) {
  const select = el("select", { name });
  if (any !== undefined) select.append(el("option", { value: "" }, any));
  for (const option of options) select.append(el("option", { value: String(option), selected: String(option) === chosen }, String(option)));
  return select;
}

export function heading(title, ...rest) {
  return el("div", { class: "heading" }, el("h1", { tabindex: "-1" }, title), ...rest);
}

/** The address of a page within this one. */
export const linkTo = (page, params = {}) => `#/${page}?${new URLSearchParams(params)}`;

/** The first run unless the address names another one. */
export const chosenRun = (params, about) => (about.runs.includes(params.run) ? params.run : about.runs[0]);
