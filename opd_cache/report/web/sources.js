// Where the page's data comes from: a server that is asked, or the report's own file.

export class SourceError extends Error {}

/** opd-cache serve. */
export class Served {
  isLive = true;

  async ask(name, params = {}) {
    return this.#answer(`api/${name}?${new URLSearchParams(params)}`);
  }

  async query(run, sql) {
    const body = JSON.stringify({ run, sql });
    return this.#answer("api/query", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  }

  async #answer(address, options) {
    let response;
    try {
      response = await fetch(address, options);
    } catch {
      throw new SourceError("the server does not answer; is opd-cache serve still running?");
    }
    const answer = await response.json();
    if (!response.ok) throw new SourceError(answer.error);
    return answer;
  }
}

const PAGE_SIZE = 25;

/** opd-cache report: a chosen set of responses stands for all. */
export class Embedded {
  isLive = false;

  constructor(data) {
    this.data = data;
  }

  async ask(name, params = {}) {
    const shown = this.data.shown[params.run];
    if (name === "samples") return page(shown, params);
    if (name === "choices") return shown.choices;
    if (name === "response") return response(shown, params);
    return this.data[name];
  }

  /** The answer of a ready query, by its name. */
  answer(run, name) {
    return this.data.answers[run][name];
  }

  /** How many samples the run has, of which some are shown. */
  total(run) {
    return this.data.shown[run].total;
  }
}

const key = (row) => `${row.episode} ${row.rollout_id} ${row.teacher}`;

function page(shown, params) {
  const order = params.sort || "reverse_kl_mean";
  const sign = (params.desc ?? "1") === "1" ? -1 : 1;
  const kept = shown.rows.filter((row) => matches(row, shown, params));
  kept.sort((a, b) => compare(a[order], b[order], sign) || a.episode - b.episode || compare(a.rollout_id, b.rollout_id, 1));
  const number = Number(params.page || 0);
  const rows = kept.slice(number * PAGE_SIZE, (number + 1) * PAGE_SIZE);
  return { total: kept.length, page: number, page_size: PAGE_SIZE, rows };
}

function matches(row, shown, params) {
  const exact = { episode: "episode", prompt: "prompt_index", teacher: "teacher", finish: "finish_reason" };
  for (const [name, column] of Object.entries(exact)) {
    if (params[name] && String(row[column]) !== params[name]) return false;
  }
  if (params.chosen && !row.chosen.split(", ").includes(params.chosen)) return false;
  if (params.kl_min && !(row.reverse_kl_mean >= Number(params.kl_min))) return false;
  if (params.kl_max && !(row.reverse_kl_mean <= Number(params.kl_max))) return false;
  return !params.text || texts(row, shown).some((text) => text.toLowerCase().includes(params.text.toLowerCase()));
}

function texts(row, shown) {
  const found = shown.responses[key(row)];
  return [found.prompt_text ?? "", found.tokens.id.map((id) => shown.texts[id]).join("")];
}

/** Nothing comes last, whichever way. */
function compare(a, b, sign) {
  if (a === b) return 0;
  if (a === null) return 1;
  if (b === null) return -1;
  return a < b ? -sign : sign;
}

function response(shown, params) {
  const asked = (row) => String(row.episode) === params.episode && row.rollout_id === params.rollout;
  const rows = shown.rows.filter(asked);
  const row = rows.find((one) => one.teacher === params.teacher) ?? rows[0];
  if (!row) throw new SourceError(`rollout ${params.rollout} is not among the responses of this report; opd-cache serve shows all.`);
  const siblings = shown.rows.filter((one) => one.prompt_index === row.prompt_index && one.teacher === row.teacher);
  siblings.sort((a, b) => a.episode - b.episode || a.sample_index - b.sample_index);
  return { ...shown.responses[key(row)], texts: shown.texts, teachers: rows.map((one) => one.teacher), siblings };
}
