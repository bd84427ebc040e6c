/** Transition: what an order would do, the order itself, how it goes, and what it has cost. */

import { newOpId } from "../api.js";
import { fill, h, panel, patch, setText } from "../dom.js";
import { operationMoves } from "../moves.js";
import { operationView, planView } from "../operation.js";
import { Tiles } from "../tiles.js";

const CANCELLED_BEFORE = ["plan", "prepare"];

function build({ store, feed, ask }) {
  const replicas = h("input", { id: "replicas", type: "number", min: 1, max: 64, inputmode: "numeric" });
  const devices = h("input", { id: "devices", placeholder: "host:0 host:2", autocomplete: "off" });
  const remove = h("input", { id: "remove", placeholder: "r1 r3", autocomplete: "off" });
  const lost = h("input", { id: "lost", type: "checkbox" });
  const reason = h("input", { id: "reason", maxlength: 500, autocomplete: "off" });
  const kinds = { replicas, devices, remove };
  const radios = Object.fromEntries(
    Object.keys(kinds).map((kind) => [
      kind,
      h("input", {
        type: "radio",
        name: "kind",
        value: kind,
        id: `kind-${kind}`,
        checked: kind === "replicas",
        onchange: choose,
      }),
    ]),
  );
  const said = h("p", { class: "refused", role: "alert" });
  const preview = h("div", { class: "preview", "aria-live": "polite" });
  const order = h(
    "form",
    { class: "order", onsubmit: look, oninput: edited },
    h(
      "fieldset",
      {},
      h("legend", {}, "Order"),
      option("replicas", "So many replicas", replicas),
      option("devices", "Exactly these devices", devices),
      option(
        "remove",
        "Without these replicas",
        remove,
        h("label", { class: "inline" }, lost, " their devices have lost their memory"),
      ),
      h("label", { for: "reason" }, "Reason (kept with the operation)"),
      reason,
    ),
    h(
      "div",
      { class: "buttons" },
      h("button", { class: "main", id: "preview" }, "Preview"),
      h("button", { type: "button", id: "rebalance", onclick: rebalance }, "Level requests"),
    ),
  );
  const present = h("div", {});
  const cancel = h(
    "button",
    { type: "button", class: "danger", id: "cancel", hidden: true, onclick: undo },
    "Cancel: back to the old layout",
  );
  const moves = h("div", {});
  const moving = panel("What moves", moves);
  const tiles = new Tiles();
  const touched = panel("Devices that change", tiles.element);
  const title = h("h2", {}, "Operation");
  let isFilled = false;
  let looked = null; // the order that is previewed
  let level = null; // { op_id, isBegun } of the last order to level: pressed again while that is in progress, it is one

  function option(kind, words, ...fields) {
    return h(
      "div",
      { class: "option" },
      radios[kind],
      h("label", { for: `kind-${kind}` }, words),
      h("label", { class: "hidden", for: kind }, words),
      fields,
    );
  }

  function choose() {
    for (const [kind, field] of Object.entries(kinds)) field.disabled = !radios[kind].checked;
    lost.disabled = !radios.remove.checked;
    forget();
  }

  /** What was previewed is not what stands in the form any more. */
  function edited(event) {
    if (event.target === replicas) isFilled = true;
    if (event.target !== reason) forget();
  }

  function forget() {
    looked = null;
    fill(preview);
    setText(said, "");
  }

  function target() {
    const kind = Object.keys(kinds).find((name) => radios[name].checked);
    if (kind === "replicas") return { replicas: Number(replicas.value) };
    const names = kinds[kind].value.split(/[\s,]+/).filter(Boolean);
    return kind === "remove" ? { remove: names, lost: lost.checked } : { devices: names };
  }

  /** Do it, and say what was refused where it was. */
  async function attempt(act) {
    setText(said, "");
    try {
      return await act();
    } catch (refusal) {
      if (refusal.status === undefined) throw refusal;
      setText(said, `${refusal.message} (${refusal.code})`);
      return null;
    }
  }

  async function look(event) {
    event.preventDefault();
    const wanted = target();
    looked = wanted;
    const answer = await attempt(() => ask("POST", "/v1/scale", { ...wanted, dry_run: true }));
    if (looked !== wanted) return;
    if (answer === null) {
      fill(preview);
      return;
    }
    const plan = answer.value;
    const asked = { ...wanted, op_id: newOpId() }; // one order, however often it is pressed
    const go =
      plan.kind === "none"
        ? null
        : h(
            "button",
            { type: "button", class: "main", id: "scale", onclick: () => scale(asked) },
            wanted.lost ? "Leave the lost devices out" : "Do it",
          );
    fill(preview, h("h3", {}, "This is what it would do"), planView(plan), go);
  }

  async function scale(asked) {
    const answer = await attempt(() => ask("POST", "/v1/scale", { ...asked, reason: reason.value }));
    if (answer === null) return;
    begun(answer.value);
  }

  async function rebalance() {
    level ??= { op_id: newOpId(), isBegun: false };
    const asked = level;
    const answer = await attempt(() => ask("POST", "/v1/rebalance", { op_id: asked.op_id, reason: reason.value }));
    if (answer === null) {
      level = null;
      return;
    }
    asked.isBegun = true;
    begun(answer.value);
  }

  function begun(operation) {
    forget();
    store.update({ operation });
    feed.nudge("last");
  }

  async function undo() {
    const { operation } = store.state;
    if (operation === null) return;
    const answer = await attempt(() => ask("DELETE", `/v1/operations/${operation.op_id}`));
    if (answer !== null) begun(answer.value);
  }

  function update(state) {
    if (!isFilled && state.now.replicas !== null) {
      isFilled = true;
      replicas.value = state.now.replicas;
    }
    if (level?.isBegun && state.operation?.op_id !== level.op_id) level = null;
    const operation = state.operation ?? state.last?.operations[0] ?? null;
    setText(title, state.operation === null ? "Last operation" : "Operation in progress");
    patch(present, operation === null ? h("p", {}, "There was none yet.") : operationView(operation));
    cancel.hidden =
      state.operation === null || !CANCELLED_BEFORE.includes(state.operation.phase) || state.operation.leg > 1;
    const changing = new Set(
      state.operation === null
        ? []
        : Object.entries(state.operation.planned?.devices ?? {})
            .filter(([, change]) => change.bytes_in > 0 || change.experts_before !== change.experts_after)
            .map(([name]) => name),
    );
    const shown = [...state.devices.values()].filter(
      (device) =>
        changing.has(device.name) ||
        ["joining", "leaving"].includes(device.state) ||
        state.ranks.get(device.slot)?.moving,
    );
    touched.hidden = shown.length === 0;
    tiles.update(shown, state.ranks);
    updateMoves(state);
  }

  function updateMoves({ operation, moves: told, devices: all, ranks }) {
    moving.hidden = operation === null;
    if (operation === null) return;
    patch(moves, operationMoves(operation, told?.op_id === operation.op_id ? told.legs : null, all, ranks));
  }

  choose();
  const element = h(
    "div",
    { class: "two" },
    panel("Scale", order, said, preview),
    h("section", { class: "panel" }, title, cancel, present),
    moving,
    touched,
  );
  return { element, update, destroy: () => tiles.destroy() };
}

export const transition = { title: "Transition", needs: ["last", "moves"], build };
