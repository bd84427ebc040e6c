/** The page: its head, the view that the address names, and the form for the token. */

import { ask } from "./api.js";
import { redraw } from "./charts.js";
import { badge, fill, h, patch, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { clock, plural } from "./format.js";
import { decoded, dropToken, keepToken, takeTokenFromAddress, theme, token, useTheme } from "./session.js";
import { createStore } from "./store.js";
import { decisions } from "./views/decisions.js";
import { events } from "./views/events.js";
import { experts } from "./views/experts.js";
import { health } from "./views/health.js";
import { now } from "./views/now.js";
import { transition } from "./views/transition.js";

const VIEWS = { now, experts, transition, decisions, events, health };
const PHASES = { serving: "ok", starting: "busy", loading: "busy", attaching: "busy", degraded: "warn", failed: "bad" };
const OLD_MS = 3_000; // what is shown and older than that is said to be
const THEMES = ["auto", "light", "dark"];
const NO_TOKEN = "This can be no token: a token has letters, digits and signs of ASCII alone, and no space.";
const ANOTHER_TOKEN = "This token is not the deployment's: it has another one, or was started anew.";

const store = createStore();
let shown = { name: "", view: null };
const feed = new Feed(store, () => VIEWS[shown.name]?.needs ?? []);
const app = { store, feed, ask };

// ---- the head -------------------------------------------------------------------------------------------------------

const parts = {
  phase: h("span", { id: "phase" }),
  size: h("span", { id: "size" }),
  policy: h("span", { id: "mode" }),
  live: h("span", { id: "live", role: "status" }),
  asOf: h("span", { id: "as-of", class: "count" }),
};
const links = Object.entries(VIEWS).map(([name, view]) => h("a", { href: `#/${name}`, "data-view": name }, view.title));
const themeButton = h("button", { class: "quiet", onclick: nextTheme });

function buildHead() {
  const leave = h("button", { class: "quiet", onclick: () => signOut("") }, "Forget token");
  fill(
    document.getElementById("head"),
    h("div", { class: "title" }, h("h1", {}, "ElasticMoE"), parts.phase, parts.size, parts.live, parts.asOf),
    h("nav", { "aria-label": "Views" }, links),
    h("div", { class: "tools" }, themeButton, leave),
  );
}

function nextTheme() {
  useTheme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
  setText(themeButton, `Theme: ${theme()}`);
  redraw();
}

function updateHead({ now: seen, connection }) {
  if (seen !== null) {
    patch(parts.phase, badge(PHASES[seen.phase] ?? "calm", seen.phase));
    const wanted = seen.target === seen.replicas ? "" : ` → ${seen.target} wanted`;
    const size = `${plural(seen.replicas, "replica")}${wanted}, epoch ${seen.epoch ?? "–"}`;
    setText(parts.size, seen.replicas === null ? "size not known" : size);
    document.title = `${seen.phase} · ElasticMoE`;
  }
  const isLive = connection.state === "live";
  document.body.classList.toggle("stale", connection.state === "stale");
  if (parts.live.textContent !== connection.state)
    fill(parts.live, badge(isLive ? "ok" : connection.state === "stale" ? "bad" : "busy", connection.state));
  const stale = document.getElementById("stale");
  stale.hidden = connection.state !== "stale";
  const since = connection.seen ? `What is shown is of ${clock(connection.seen / 1000)}. ` : "";
  if (!stale.hidden)
    setText(
      stale,
      `Stale: ${connection.why}. ${since}This page looks again until somebody answers; serving does not depend on it.`,
    );
}

/** Say of what time it is what the view shows, where that is some time ago. */
function tellAge({ asOf, connection, operation }) {
  const names = ["now", ...(operation === null ? [] : ["operation"]), ...(VIEWS[shown.name]?.needs ?? [])];
  const old = names.filter((name) => Date.now() - (asOf[name] ?? Infinity) > OLD_MS);
  const said = old.map((name) => `${name === "now" ? "" : `${name} `}as of ${clock(asOf[name] / 1000)}`);
  setText(parts.asOf, connection.state === "live" ? said.join(", ") : "");
}

// ---- views ----------------------------------------------------------------------------------------------------------

/** `#/events/12-7` names a view and what in it. */
function addressed() {
  const [, name, ...rest] = location.hash.split("/");
  return { name: Object.hasOwn(VIEWS, name) ? name : "now", rest: decoded(rest.join("/")) };
}

function show() {
  if (token() === "") return;
  const { name, rest } = addressed();
  if (name !== shown.name) {
    shown.view?.destroy?.();
    const view = VIEWS[name].build(app);
    shown = { name, view };
    fill(document.getElementById("main"), view.element);
    scrollTo(0, 0);
  }
  for (const link of links) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  shown.view.address?.(rest);
  if (store.state.now !== null) shown.view.update(store.state);
  feed.nudge();
}

// ---- the token ------------------------------------------------------------------------------------------------------

function signOut(why) {
  dropToken();
  feed.stop();
  shown.view?.destroy?.();
  shown = { name: "", view: null };
  document.body.classList.add("outside");
  const field = h("input", {
    id: "token",
    type: "password",
    autocomplete: "off",
    required: true,
    "aria-describedby": "token-hint",
  });
  const refused = h("p", { class: "refused", role: "alert", id: "token-refused" }, why);
  const enter = (event) => {
    event.preventDefault();
    if (keepToken(field.value.trim())) begin();
    else setText(refused, NO_TOKEN);
  };
  fill(
    document.getElementById("main"),
    h(
      "form",
      { class: "panel token", onsubmit: enter },
      h("h2", {}, "Admin token"),
      h(
        "p",
        { id: "token-hint" },
        "It is in secrets/admin.token of the run directory; `elasticmoe status` names that. It stays in this tab.",
      ),
      h("label", { for: "token" }, "Token"),
      field,
      refused,
      h("button", { class: "main" }, "Open"),
    ),
  );
  field.focus();
}

/** With a token that has just come: it may be another deployment's, of which nothing is here yet. */
function begin() {
  location.reload();
}

function signIn() {
  show();
  feed.start();
}

store.subscribe((state) => {
  if (state.connection.state === "refused" && token() !== "") {
    store.update({ connection: { ...state.connection, state: "connecting" } });
    signOut(ANOTHER_TOKEN);
    return;
  }
  updateHead(state);
  tellAge(state);
  if (state.now !== null) shown.view?.update(state);
});

setInterval(() => tellAge(store.state), 1_000);
useTheme(theme());
setText(themeButton, `Theme: ${theme()}`);
buildHead();
addEventListener("hashchange", () => {
  if (!location.hash.startsWith("#token=")) show();
  else if (takeTokenFromAddress()) begin();
  else signOut(NO_TOKEN);
});
if (!takeTokenFromAddress()) signOut(NO_TOKEN);
else if (token() === "") signOut("");
else signIn();
