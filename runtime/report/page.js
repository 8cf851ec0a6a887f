"use strict";
// The page's data is text: it gets into the page by textContent alone, and into styles as numbers.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [LEFT, RIGHT, TOP, BOTTOM, WIDTH] = [54, 512, 8, 184, 520]; // svg.py's plotting area
  const PAGE = 12;
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const short = (value) => (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6)
    ? String(+value.toPrecision(4)) : value.toExponential(2));

  // Figures: the values at the pointer, or at a step chosen with the arrow keys.
  for (const plot of document.querySelectorAll("[data-figure]")) {
    const figure = data.figures[plot.dataset.figure];
    const svg = plot.querySelector("svg");
    const readout = plot.parentElement.querySelector(".readout");
    const steps = [...new Set(figure.series.flatMap((series) => series.steps))].sort((a, b) => a - b);
    let cursor = null, at = -1;
    const show = (index) => {
      at = Math.max(0, Math.min(steps.length - 1, index));
      const step = steps[at];
      const values = figure.series.flatMap((series) => {
        const i = series.steps.indexOf(step);
        return i < 0 ? [] : [`${series.label} ${short(series.values[i])}`];
      });
      readout.textContent = `${data.unit} ${short(step)}: ${values.join(", ")}`;
      cursor ??= svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
      const x = LEFT + (step - figure.low) / (figure.high - figure.low) * (RIGHT - LEFT);
      cursor.setAttribute("class", "cursor");
      cursor.setAttribute("d", `M${x} ${TOP}V${BOTTOM}`);
    };
    const hide = () => {
      readout.textContent = "";
      cursor?.remove();
      cursor = null;
    };
    plot.addEventListener("mousemove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * WIDTH;
      const step = figure.low + (x - LEFT) / (RIGHT - LEFT) * (figure.high - figure.low);
      let nearest = 0;
      steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(steps[nearest] - step)) nearest = i; });
      show(nearest);
    });
    plot.addEventListener("mouseleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at < 0 ? steps.length - 1 : at); });
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length };
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(at + moves[event.key]);
    });
  }

  // Completions.
  const form = document.getElementById("filter");
  if (!form) return;
  const list = document.getElementById("list"), more = document.getElementById("more");
  const count = document.getElementById("count"), scale = document.getElementById("scale");
  const SCALES = {
    logprob: "Point at a token, or tab to the completion and use the arrow keys. Log-prob of each token as the sampler drew it: the darker the orange, the less likely (full at 1 in 150).",
    ratio: "π_trainer / π_sampler of each token: blue below 1, orange above, full at a factor of 1.65.",
    mask: "Struck through on grey: no part in the update. Violet: beyond the cap of the importance weight.",
  };
  const wholes = data.samples.map((sample) => sample.text ?? sample.tok.join(""));
  const haystacks = data.samples.map(
    (sample, i) => `${data.prompts[sample.p]}\n${wholes[i]}\n${sample.gold}\n${sample.chips.join("\n")}`.toLowerCase());
  let matching = [], shown = 0;

  const wanted = () => Object.fromEntries(new FormData(form));

  function filter() {
    const want = wanted(), text = (want.text || "").toLowerCase();
    matching = data.samples.map((_, i) => i).filter((i) => {
      const sample = data.samples[i];
      return (!want.step || String(sample.s) === want.step) && (!want.verdict || sample.v === want.verdict)
        && (!want.truncated || sample.cut) && (!want.equal || sample.eq) && (!text || haystacks[i].includes(text));
    });
    if (want.sort === "length") matching.sort((a, b) => data.samples[b].len - data.samples[a].len);
    scale.textContent = SCALES[want.colour] || "";
    scale.hidden = !want.colour;
    const keep = Math.max(shown, PAGE);
    list.replaceChildren();
    shown = 0;
    grow(keep);
  }

  function grow(many) {
    const colour = wanted().colour || "";
    for (const i of matching.slice(shown, shown + many)) list.append(card(data.samples[i], i, colour));
    shown = Math.min(shown + many, matching.length);
    count.textContent = `${matching.length} match, ${shown} shown.`;
    more.hidden = shown === matching.length;
  }

  function card(sample, index, colour) {
    const article = make("article", "card sample");
    const header = article.appendChild(make("header"));
    const place = [`${data.unit} ${sample.s}`];
    if (sample.g !== null) place.push(`group ${sample.g}`);
    if (sample.n !== null) place.push(`sample ${sample.n}`);
    header.append(make("span", "soft", place.join(" · ")), make("span", `chip ${sample.v}`, sample.v));
    for (const text of sample.chips) header.append(make("span", "chip", text));
    header.append(make("span", "chip", `${sample.len} tokens`));
    if (sample.cut) header.append(make("span", "chip bad", "truncated"));
    if (sample.eq) header.append(make("span", "chip", "all-equal group"));
    if (sample.mask) header.append(make("span", "chip unknown", sample.mask));
    if (sample.gold) header.append(make("span", "chip", `gold: ${sample.gold}`));
    article.append(make("div", "prompt", data.prompts[sample.p]));
    const body = article.appendChild(make("div", "completion"));
    if (!sample.tok || (sample.text !== undefined && !colour)) {
      plain(body, wholes[index]);
    } else {
      tokens(body, sample, colour, article.appendChild(make("div", "token small soft")));
    }
    return article;
  }

  function plain(body, text) {
    const end = text.indexOf("</think>");
    const at = end >= 0 ? end + 8 : text.trimStart().startsWith("<think>") ? text.length : 0;
    body.append(make("span", "thinking", text.slice(0, at)), text.slice(at));
  }

  function tokens(body, sample, colour, readout) {
    const last = sample.tok.length - 1, capped = new Set(sample.cap || []);
    const elements = sample.tok.map((text, i) => {
      const token = make("i", "", colour && text.includes("\n") ? text.replaceAll("\n", "↵\n") : text || (colour ? "·" : ""));
      paint(token, sample, i, colour, capped);
      return token;
    });
    // An element for the reasoning, as far as it is closed.
    let whole = "", close = -1;
    for (let i = 0; i <= last && close < 0; i++) if ((whole += sample.tok[i]).includes("</think>")) close = i;
    if (close < 0 && whole.trimStart().startsWith("<think>")) close = last;
    const thinking = make("span", "thinking");
    elements.forEach((token, i) => {
      if (sample.gap === i) (i <= close ? thinking : body).append(`\n… ${sample.len - sample.tok.length} tokens left out …\n`);
      if (i === close + 1) body.prepend(thinking);
      (i <= close ? thinking : body).append(token);
    });
    if (close === last) body.prepend(thinking);

    let at = -1;
    const show = (i) => {
      elements[at]?.classList.remove("at");
      at = Math.max(0, Math.min(last, i));
      elements[at].classList.add("at");
      readout.textContent = figures(sample, at, capped);
    };
    body.tabIndex = 0;
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", "Completion; the arrow keys go from token to token");
    readout.setAttribute("aria-live", "polite");
    elements.forEach((token, i) => token.addEventListener("mouseenter", () => show(i)));
    body.addEventListener("focus", () => { if (body.matches(":focus-visible") && at < 0) show(0); });
    body.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -last - 1, End: last + 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      show(at + moves[event.key]);
      elements[at].scrollIntoView({ block: "nearest" });
    });
  }

  function paint(token, sample, i, colour, capped) {
    const back = (name, share) => token.style.setProperty("background", `rgb(var(--${name}) / ${(0.75 * share).toFixed(3)})`);
    if (colour === "logprob" && sample.lp[i] !== null) back("hot", Math.min(1, -sample.lp[i] / 5));
    if (colour === "ratio" && sample.lr && sample.lr[i] !== null) {
      back(sample.lr[i] < 0 ? "cold" : "hot", Math.min(1, Math.abs(sample.lr[i]) / 0.5));
    }
    if (colour === "mask" && sample.mask) {
      back("off", 0.4);
      token.className = "off";
    } else if (colour === "mask" && capped.has(i)) back("cap", 0.8);
  }

  function figures(sample, i, capped) {
    const place = sample.gap !== undefined && i >= sample.gap ? sample.len - sample.tok.length + i : i;
    const parts = [`token ${place + 1} of ${sample.len} ${JSON.stringify(sample.tok[i])}`];
    const lp = sample.lp[i];
    if (lp !== null) parts.push(`log p ${short(lp)} (${short(100 * Math.exp(lp))} %)`);
    if (sample.lr && sample.lr[i] !== null) parts.push(`π_trainer / π_sampler ${Math.exp(sample.lr[i]).toFixed(4)} (log ${short(sample.lr[i])})`);
    parts.push(sample.mask || (capped.has(i) ? "trained, weight at its cap" : "trained"));
    return parts.join(" · ");
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { shown = 0; filter(); });
  form.addEventListener("reset", () => setTimeout(() => { shown = 0; filter(); }));
  more.addEventListener("click", () => grow(PAGE));

  // #samples?verdict=wrong&step=12, as the findings link to.
  function follow() {
    const [place, query] = location.hash.slice(1).split("?");
    if (place !== "samples") return;
    const want = new URLSearchParams(query || "");
    form.reset();
    for (const [name, value] of want) {
      const field = form.elements[name];
      if (field instanceof RadioNodeList) field.value = value;
      else if (field?.type === "checkbox") field.checked = value === "1";
      else if (field) field.value = value;
    }
    shown = 0;
    filter();
    document.getElementById("samples").scrollIntoView();
  }
  addEventListener("hashchange", follow);
  filter();
  follow();
})();
