"""What a page does in a browser, and how its charts and inputs look.

Kept as Python, because a Flower app is packed without files of script or style.
"""

STYLE = """
:root { --none: #eaf3f9; --all: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --none: #12202b; --all: #56B4E9; } }
.alert { padding: .5rem .75rem; border-left: 4px solid #D55E00; background: var(--over); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .5rem;
  margin: 1rem 0; padding: 0; }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: .4rem .6rem; }
.cards dt { color: var(--soft); font-size: .8rem; } .cards dd { margin: 0; font-size: 1.25rem;
  font-variant-numeric: tabular-nums; } .cards .note { font-size: .75rem; }
figcaption { margin: 0 .25rem .5rem; } .says { margin: .25rem; font-size: .85rem; min-height: 1.3em;
  overflow-wrap: anywhere; } .says:empty { display: none; }
.scale { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .25rem;
  font-size: .8rem; color: var(--soft); } .scale i { width: 7rem; height: .7rem; border-radius: 2px;
  background: linear-gradient(90deg, var(--none), var(--all)); }
.scale .alarm { width: 1rem; margin-left: .6rem; background: #D55E00; }
.plot { margin: auto; width: 100%; } [hidden] { display: none !important; }
fieldset { border: 0; margin: .25rem; padding: 0; min-width: 0; display: flex; flex-wrap: wrap;
  gap: .25rem; align-items: center; font-size: .85rem; }
legend { float: left; padding: 0; margin-right: .5rem; color: var(--soft); }
.buttons input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.buttons label { position: relative; }
.buttons span { display: block; padding: .2rem .6rem; border: 1px solid var(--line);
  border-radius: 6px; cursor: pointer; }
.buttons input:checked + span { background: var(--bar); border-color: currentColor; }
:focus-visible, .buttons input:focus-visible + span { outline: 2px solid #E69F00;
  outline-offset: 1px; }
.slider { display: flex; align-items: center; gap: .6rem; margin: .25rem; font-size: .85rem; }
.slider input { flex: 1; min-width: 0; accent-color: #0072B2; }
.slider output { min-width: 7.5em; } button { font: inherit; color: inherit;
  background: none; border: 1px solid var(--line); border-radius: 6px; padding: .2rem .6rem;
  cursor: pointer; } .play { min-width: 5em; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: .25rem; font-size: .85rem; }
.legend label { cursor: pointer; overflow-wrap: anywhere; } .legend svg { margin: 0 .3rem; }
th button { border: 0; padding: 0; font-weight: 600; text-decoration: underline dotted; }
th[aria-sort] button { color: var(--ink); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.wide + .wide { margin-top: 1rem; } details { margin: .5rem 0; } summary { cursor: pointer; }
"""

SCRIPT = """
"use strict";
(() => {
  const templates = JSON.parse(document.getElementById("templates").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const template = () => templates[dark.matches ? "dark" : "light"];
  const options = {responsive: true, displayModeBar: false};
  const plots = [];

  const draw = (figure) => {
    const plot = figure.querySelector(".plot");
    const spec = JSON.parse(figure.querySelector("script").textContent);
    spec.layout.template = template();
    Plotly.newPlot(plot, spec.data, spec.layout, options);
    plots.push(plot);
    const says = figure.querySelectorAll(".says");
    const choose = (choice, index) => {
      const option = spec.choices[choice][index];
      says[choice].textContent = option.note;
      return Plotly.update(plot, option.data, option.layout);
    };
    for (const group of figure.querySelectorAll(".buttons")) {
      group.addEventListener("change", (event) =>
        choose(Number(group.dataset.choice), Number(event.target.value)));
    }
    for (const box of figure.querySelectorAll(".slider")) {
      slide(box, spec.choices[Number(box.dataset.choice)],
        (index) => choose(Number(box.dataset.choice), index));
    }
    for (const box of figure.querySelectorAll(".legend input")) {
      const traces = box.dataset.traces.split(" ").map(Number);
      box.addEventListener("change", () =>
        Plotly.restyle(plot, {visible: box.checked}, traces));
    }
  };

  const slide = (box, steps, choose) => {
    const input = box.querySelector("input");
    const output = box.querySelector("output");
    const play = box.querySelector(".play");
    let timer = 0;
    const go = () => {
      const label = steps[Number(input.value)].label;
      output.textContent = label;
      input.setAttribute("aria-valuetext", label);
      return choose(Number(input.value));
    };
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      play.textContent = "Play";
    };
    const step = () => {
      input.value = (Number(input.value) + 1) % steps.length;
      go();
      if (Number(input.value) === steps.length - 1) stop();
    };
    input.addEventListener("input", () => { stop(); go(); });
    play.addEventListener("click", () => {
      if (timer) { stop(); return; }
      play.textContent = "Pause";
      timer = setInterval(step, Math.max(100, Math.min(700, 20000 / steps.length)));
      step();
    });
  };

  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent;
    return text === "" || isNaN(text) ? text : Number(text);
  };
  const order = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b);
    return typeof a === "number" ? -1 : 1;
  };
  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const falls = now ? now === "ascending" : !head.classList.contains("word");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const known = rows.filter((row) => value(row, column) !== "");
      known.sort((a, b) => order(value(a, column), value(b, column)));
      if (falls) known.reverse();
      table.tBodies[0].append(...known, ...rows.filter((row) => !known.includes(row)));
    }));
  };

  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("figure.chart").forEach(draw);
  dark.addEventListener("change", () => {
    for (const plot of plots) Plotly.relayout(plot, {template: template()});
  });
})();
"""
