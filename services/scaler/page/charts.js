/** Small charts over time, on uPlot; each says in words what it draws. */

import { h, setText } from "./dom.js";
import { clock } from "./format.js";

const HEIGHT = 92;
const LINES = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5"];
const all = new Set();

/** A colour of the style sheet as it is in the present theme: a canvas does not know its names. */
export function colour(name) {
  const probe = h("i", { hidden: true, style: { color: `var(${name})` } });
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

/** Times of the axis, with seconds where its steps are shorter than a minute. */
const times = (_, at, __, ___, step) => at.map((time) => clock(time).slice(-8, step < 60 ? undefined : -3));

/** Draw all anew: the theme is another one. */
export function redraw() {
  for (const chart of all) chart.rebuild();
}

/**
 * A chart of some columns. `spec`: { title, lines: [[column, words]], format, least: of the axis's top, isStepped }.
 * `onCursor(index)`: the row that is pointed at, or null.
 */
export class Chart {
  #spec;
  #plot = null;
  #data = null;
  #objective = null;
  #onCursor;
  #resized;

  constructor(spec, onCursor = () => {}) {
    this.#spec = spec;
    this.#onCursor = onCursor;
    this.element = h("div", { class: "chart", role: "img" });
    this.#resized = new ResizeObserver(() => this.#fit());
    this.#resized.observe(this.element);
    all.add(this);
  }

  /** Show these columns, and a line at the objective, where there is one. */
  update(columns, objective = null) {
    const data = [columns.at, ...this.#spec.lines.map(([name]) => columns[name])];
    const isAnother = objective !== this.#objective;
    this.#data = data;
    this.#objective = objective;
    if (this.#plot === null || isAnother) this.rebuild();
    else this.#plot.setData(this.#drawn());
    this.element.setAttribute("aria-label", this.#words());
  }

  /** Forget it. */
  destroy() {
    all.delete(this);
    this.#resized.disconnect();
    this.#plot?.destroy();
  }

  rebuild() {
    if (this.#data === null || this.element.clientWidth === 0) return;
    this.#plot?.destroy();
    this.#plot = new uPlot(this.#options(), this.#drawn(), this.element);
  }

  #fit() {
    const width = this.element.clientWidth;
    if (this.#plot === null) this.rebuild();
    else if (width > 0 && width !== this.#plot.width) this.#plot.setSize({ width, height: HEIGHT });
  }

  #drawn() {
    return this.#objective === null ? this.#data : [...this.#data, this.#data[0].map(() => this.#objective)];
  }

  #options() {
    const axis = {
      stroke: colour("--quiet"),
      grid: { stroke: colour("--grid"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui",
    };
    const paths = this.#spec.isStepped ? uPlot.paths.stepped({ align: 1 }) : undefined;
    const series = this.#spec.lines.map(([, label], n) => ({
      label,
      stroke: colour(LINES[n]),
      width: 1.5,
      fill:
        this.#spec.lines.length === 1 ? colour(LINES[n]).replace("rgb(", "rgba(").replace(")", ", 0.12)") : undefined,
      points: { show: false },
      paths,
    }));
    const objective = { label: "objective", stroke: colour("--bad"), width: 1, dash: [4, 4], points: { show: false } };
    return {
      width: this.element.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      padding: [6, 16, 0, 0],
      cursor: { y: false, sync: { key: "time" }, points: { size: 6 } },
      scales: {
        y: { range: (_, __, most) => [0, Math.max(most ?? 0, this.#objective ?? 0, this.#spec.least) * 1.08] },
      },
      axes: [
        { ...axis, size: 20, space: 70, values: times },
        { ...axis, size: 52, space: 26, values: (_, values) => values.map((value) => this.#spec.format(value)) },
      ],
      series: [{}, ...series, ...(this.#objective === null ? [] : [objective])],
      hooks: { setCursor: [(plot) => this.#onCursor(plot.cursor.idx ?? null)] },
    };
  }

  #words() {
    const parts = this.#spec.lines.map(([, label], n) => {
      const known = this.#data[n + 1].filter((value) => value !== null);
      if (known.length === 0) return `${label}: not known`;
      const { format } = this.#spec;
      const [least, most] = known.reduce(
        ([low, high], value) => [Math.min(low, value), Math.max(high, value)],
        [Infinity, -Infinity],
      );
      return `${label}: now ${format(this.#data[n + 1].at(-1))}, least ${format(least)}, most ${format(most)}`;
    });
    return `${this.#spec.title} over time. ${parts.join(". ")}`;
  }
}

/** A chart in a card with its newest figures, or those that are pointed at. */
export class ChartCard {
  #spec;
  #chart;
  #values;
  #note;
  #when;
  #columns = null;
  #at = null;
  #legend;

  constructor(spec) {
    this.#spec = spec;
    this.#chart = new Chart(spec, (index) => this.#point(index));
    this.#values = spec.lines.map(([name]) => h("span", { class: "figure", "data-figure": name }));
    this.#note = h("span", { class: "note" });
    this.#when = h("span", { class: "when" });
    const isOne = spec.lines.length === 1;
    this.#legend = spec.lines.map(([, label], n) =>
      h(
        "span",
        { class: "value" },
        isOne ? null : h("i", { class: `key key-${n + 1}` }),
        this.#values[n],
        isOne ? null : h("small", {}, ` ${label}`),
      ),
    );
    this.element = h(
      "article",
      { class: spec.isWide ? "card wide" : "card" },
      h("header", {}, h("h3", {}, spec.title), this.#note, this.#when),
      h("p", { class: isOne ? "values one" : "values" }, this.#legend),
      this.#chart.element,
    );
  }

  update(columns, objective = null) {
    this.#columns = columns;
    this.#chart.update(columns, objective);
    setText(this.#note, objective === null ? "" : `objective ${this.#spec.format(objective)}`);
    const last = this.#spec.lines.map(([name]) => columns[name].at(-1) ?? null).filter((value) => value !== null);
    const isMissed =
      objective !== null &&
      last.some((value) => (this.#spec.isGoodAbove ? value < objective : value > objective));
    this.element.classList.toggle("missed", isMissed);
    this.#note.classList.toggle("missed", isMissed);
    if (isMissed) setText(this.#note, `${this.#note.textContent}: missed`);
    this.#show();
  }

  destroy() {
    this.#chart.destroy();
  }

  #point(index) {
    this.#at = index;
    this.#show();
  }

  #show() {
    if (this.#columns === null) return;
    const isPast = this.#at !== null && this.#at < this.#columns.at.length;
    const at = isPast ? this.#at : this.#columns.at.length - 1;
    this.#spec.lines.forEach(([name], n) => {
      const value = this.#columns[name][at] ?? null;
      setText(this.#values[n], this.#spec.format(value));
      this.#values[n].dataset.value = value ?? "";
    });
    setText(this.#when, isPast ? `at ${clock(this.#columns.at[at])}` : "");
  }
}
