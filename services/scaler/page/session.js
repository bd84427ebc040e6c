/** The admin token, for as long as the tab lives: in the session's storage, never in an address. */

const TOKEN = "elasticmoe.token";
const THEME = "elasticmoe.theme";

/** Take the token out of the address's fragment, where `elasticmoe up` puts it: browsers send that to nobody. The
 * address without it takes its place at once. False where what stands there can be none. */
export function takeTokenFromAddress() {
  const found = /^#token=(.*)$/.exec(location.hash);
  if (found === null) return true;
  history.replaceState(null, "", `${location.pathname}#/now`);
  return keepToken(decoded(found[1]));
}

/** Keep a token. False where a header cannot carry it, so that it can be none: it is not kept. */
export function keepToken(text) {
  if (!/^[!-~]+$/.test(text)) return false;
  sessionStorage.setItem(TOKEN, text);
  return true;
}

/** What stands in an address, with its escapes read; as it stands where they are none. */
export function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export const token = () => sessionStorage.getItem(TOKEN) ?? "";
export const dropToken = () => sessionStorage.removeItem(TOKEN);

/** `light`, `dark`, or `auto`: as the system has it. */
export const theme = () => localStorage.getItem(THEME) ?? "auto";

/** Show the page in another theme from now on. */
export function useTheme(name) {
  localStorage.setItem(THEME, name);
  document.documentElement.dataset.theme = name;
}
