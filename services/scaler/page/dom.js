/** Elements. Whatever comes from elsewhere becomes text, never markup. */

/**
 * An element: `h("p", { class: "hint", onclick: act }, "text", child)`. Attributes that are false, null or undefined
 * are left out; `style` is an object; what begins with `on` is listened to.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** An element of a drawing: as `h`, in SVG's namespace, without listeners. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.flat(Infinity));
  return element;
}

/** Set an element's text, where it is another one: a reader of screens hears nothing twice. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Put `children` in the place of what is in `element`. */
export function fill(element, ...children) {
  element.replaceChildren(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
}

/**
 * Make what is in `element` like `children`, with the elements that are there where they are alike: who reads, selects
 * or has the focus in it is not disturbed. For what is not listened to.
 */
export function patch(element, ...children) {
  const made = h("div", {}, ...children);
  patchChildren(element, made);
}

function patchChildren(element, made) {
  const wanted = [...made.childNodes];
  while (element.childNodes.length > wanted.length) element.lastChild.remove();
  wanted.forEach((node, n) => {
    const old = element.childNodes[n];
    if (old === undefined) element.append(node);
    else if (old.nodeName !== node.nodeName) old.replaceWith(node);
    else if (node.nodeType === Node.TEXT_NODE) {
      if (old.data !== node.data) old.data = node.data;
    } else {
      for (const { name } of [...old.attributes]) if (!node.hasAttribute(name)) old.removeAttribute(name);
      for (const { name, value } of node.attributes) {
        if (old.getAttribute(name) === value) continue;
        if (name === "style") old.style.cssText = value; // as an attribute the content policy forbids it
        else old.setAttribute(name, value);
      }
      patchChildren(old, node);
    }
  });
}

/**
 * Have in `element` one child for each of `facts`, in their order; `keyOf` names one, and whose name is there already
 * stays as it is. `known`: a Map of the children by name, which the caller keeps.
 */
export function fillByKey(element, known, facts, keyOf, make) {
  const names = facts.map(keyOf);
  const wanted = new Set(names);
  for (const [name, child] of [...known]) {
    if (wanted.has(name)) continue;
    child.remove();
    known.delete(name);
  }
  facts.forEach((fact, n) => {
    if (!known.has(names[n])) known.set(names[n], make(fact));
    const child = known.get(names[n]);
    if (element.children[n] !== child) element.insertBefore(child, element.children[n] ?? null);
  });
}

/** A figure: its words, and for programs the API's number as it came. */
export function figure(name, value, words) {
  return h("span", { class: "figure", "data-figure": name, "data-value": value ?? "" }, words);
}

/** A state in words, with a shape and a colour beside them. `tone`: ok, busy, warn, bad or calm. */
export function badge(tone, words) {
  return h("span", { class: `badge ${tone}` }, words);
}

/** A table with a head. `rows`: lists of cells; a cell is text or an element. */
export function table(caption, head, rows) {
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", {}, caption),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          head.map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            {},
            row.map((cell) => h("td", {}, cell)),
          ),
        ),
      ),
    ),
  );
}

/** A panel with a heading. */
export function panel(title, ...children) {
  return h("section", { class: "panel" }, h("h2", {}, title), ...children);
}
