/** Decisions: what the policy has decided and why, and the form for its objectives. */

import { badge, fillByKey, h, panel, patch, setText } from "../dom.js";
import { clock, number, plural, ratio } from "../format.js";

const FIELDS = [
  ["ttft_s", "Time to first token, in seconds", 0.001, 86_400],
  ["itl_s", "Time between tokens, in seconds", 0.001, 86_400],
  ["attainment", "Share of requests that keep both", 0.001, 1],
  ["replicas_min", "Fewest replicas", 1, 1_024],
  ["replicas_max", "Most replicas", 1, 1_024],
];
const MODES = [
  ["off", "nothing is decided"],
  ["advise", "decided and told, not done"],
  ["act", "decided and done"],
];

function build({ store, feed, ask }) {
  let known = null; // the policy that the form was filled from
  let isSaving = false;
  const inputs = Object.fromEntries(
    FIELDS.map(([name, , least, most]) => [
      name,
      h("input", {
        id: name,
        name,
        type: "number",
        required: true,
        min: least,
        max: most,
        step: name.startsWith("replicas") ? 1 : "any",
        "aria-describedby": `${name}-error`,
      }),
    ]),
  );
  const errors = Object.fromEntries(
    FIELDS.map(([name]) => [name, h("small", { id: `${name}-error`, class: "refused" })]),
  );
  const modes = Object.fromEntries(
    MODES.map(([mode]) => [mode, h("input", { type: "radio", name: "mode", value: mode, id: `mode-${mode}` })]),
  );
  const said = h("p", { role: "alert", class: "refused" });
  const done = h("p", { role: "status" });
  const form = h(
    "form",
    { onsubmit: save, novalidate: true, oninput: check },
    h(
      "fieldset",
      {},
      h("legend", {}, "Mode"),
      MODES.map(([mode, words]) =>
        h("div", { class: "option" }, modes[mode], h("label", { for: `mode-${mode}` }, h("b", {}, mode), ` ${words}`)),
      ),
    ),
    h(
      "fieldset",
      {},
      h("legend", {}, "Objectives and bounds"),
      FIELDS.map(([name, words]) =>
        h("div", { class: "field" }, h("label", { for: name }, words), inputs[name], errors[name]),
      ),
    ),
    h(
      "div",
      { class: "buttons" },
      h("button", { class: "main", id: "save-policy" }, "Let it be in force"),
      h("button", { type: "button", onclick: () => refill(store.state.policy) }, "As it is now"),
    ),
    said,
    done,
  );
  const lead = h("p", { class: "lead" });
  const none = h(
    "p",
    {},
    "This scaler has decided nothing yet. What was decided before it began is among the events.",
  );
  const list = h("ol", { class: "timeline", "aria-label": "Decisions, newest first" });
  const entries = new Map();
  let drawn = null;

  function refill(view) {
    if (view === null) return;
    known = view;
    for (const [name] of FIELDS) inputs[name].value = view.policy[name];
    modes[view.policy.mode].checked = true;
    check();
  }

  /** Say beside each field what is wrong with it; whether nothing is. */
  function check() {
    setText(said, "");
    setText(done, "");
    for (const [name, , least, most] of FIELDS) {
      const { validity } = inputs[name];
      setText(
        errors[name],
        validity.valid ? "" : validity.stepMismatch ? "a whole number" : `from ${least} to ${most}`,
      );
    }
    const isReversed = Number(inputs.replicas_min.value) > Number(inputs.replicas_max.value);
    if (isReversed && errors.replicas_min.textContent === "") setText(errors.replicas_min, "above the most replicas");
    for (const [name] of FIELDS) inputs[name].setAttribute("aria-invalid", String(errors[name].textContent !== ""));
    return FIELDS.every(([name]) => errors[name].textContent === "");
  }

  async function save(event) {
    event.preventDefault();
    if (known === null || isSaving || !check()) return;
    isSaving = true;
    const policy = { ...known.policy, mode: MODES.map(([mode]) => mode).find((mode) => modes[mode].checked) };
    for (const [name] of FIELDS) policy[name] = Number(inputs[name].value);
    try {
      const { value } = await ask("PUT", "/v1/policy", { version: known.version, policy });
      store.update({ policy: value });
      refill(value);
      setText(done, `In force since now, as version ${value.version}.`);
    } catch (refusal) {
      if (refusal.status === undefined) throw refusal;
      if (refusal.code === "policy_changed") feed.nudge("policy");
      setText(said, `${refusal.message} (${refusal.code})`);
    } finally {
      isSaving = false;
    }
  }

  function update(state) {
    const { policy } = state;
    if (
      policy !== null &&
      (known === null || (policy.version !== known.version && !form.contains(document.activeElement)))
    )
      refill(policy);
    if (policy !== null) {
      const wanted = policy.target === policy.replicas ? "" : `, ${policy.target} wanted`;
      patch(
        lead,
        badge(policy.policy.mode === "act" ? "ok" : "calm", policy.policy.mode),
        ` ${plural(policy.replicas, "replica")}${wanted}, policy version ${policy.version}`,
      );
    }
    if (state.decisions !== drawn && state.decisions !== null) {
      drawn = state.decisions;
      const { decisions } = drawn;
      fillByKey(
        list,
        entries,
        decisions,
        (decision) => JSON.stringify(decision),
        (decision) => entry(decision, state.words.reasons),
      );
      none.hidden = decisions.length > 0;
    }
  }

  const element = h("div", { class: "two" }, panel("Policy", lead, form), panel("Decisions", none, list));
  return { element, update };
}

function entry(decision, reasons) {
  const changes = decision.target !== null;
  const size = plural(changes ? decision.target : decision.replicas, "replica");
  const what = changes ? `${decision.replicas} → ${size}` : size;
  const tone = decision.acts ? "ok" : changes ? "warn" : "calm";
  const { raw, smoothed, threshold, demand } = decision.evidence;
  const parts = Object.entries(raw)
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${name.replace("_", " ")} ${ratio(value)}`);
  return h(
    "li",
    { "data-reason": decision.reason },
    h(
      "p",
      {},
      h("time", {}, clock(decision.time_unix)),
      badge(tone, decision.acts ? "done" : !changes ? "held" : decision.mode === "advise" ? "advised" : "wanted"),
      h("b", {}, what),
    ),
    h(
      "p",
      {},
      reasons[decision.reason] ?? decision.reason,
      h("code", {}, decision.reason),
      decision.op_id ? h("a", { href: `#/events/${decision.op_id}` }, decision.op_id) : null,
    ),
    h(
      "details",
      {},
      h("summary", {}, "What it rests on"),
      h(
        "p",
        {},
        parts.length ? `Saturation: ${parts.join(", ")}.` : "Saturation is not known.",
        smoothed === null ? "" : ` Smoothed ${ratio(smoothed)}, and it grows above ${ratio(threshold)}.`,
        demand === null
          ? ""
          : ` ${number(demand.requests_per_s)} requests/s of ${number(demand.prompt_tokens)} prompt and ` +
              `${number(demand.output_tokens)} output tokens.`,
      ),
    ),
  );
}

export const decisions = { title: "Decisions", needs: ["policy", "decisions"], build };
