// java.net.http.HttpClient as LangChain4j and Spring AI use it: by default it offers to change to HTTP/2 with each
// first request of a connection. Arguments: URL, body, and header fields as name, value, ... Prints a line per answer.

import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.stream.Collectors;

public class Client {
  static String[] fields;

  static HttpRequest.Builder to(String url) {
    HttpRequest.Builder builder = HttpRequest.newBuilder(URI.create(url));
    for (int i = 0; i < fields.length; i += 2) {
      builder.header(fields[i], fields[i + 1]);
    }
    return builder;
  }

  static void print(String what, HttpResponse<?> answer, Object body) {
    String line = String.valueOf(body).strip().replace("\n", "|");
    System.out.println(what + "\t" + answer.version() + "\t" + answer.statusCode() + "\t" + line);
  }

  public static void main(String[] args) throws Exception {
    String url = args[0];
    byte[] body = args[1].getBytes(StandardCharsets.UTF_8);
    fields = java.util.Arrays.copyOfRange(args, 2, args.length);

    HttpClient client = HttpClient.newHttpClient(); // HTTP/2 where the server takes the offer
    for (int i = 0; i < 3; i++) {
      HttpResponse<String> answer =
          client.send(to(url).POST(BodyPublishers.ofByteArray(body)).build(), BodyHandlers.ofString());
      print("whole", answer, answer.body());
    }
    HttpResponse<String> inChunks =
        client.send(
            to(url).POST(BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body))).build(),
            BodyHandlers.ofString());
    print("chunks", inChunks, inChunks.body());

    HttpResponse<String> expecting =
        HttpClient.newHttpClient()
            .send(to(url).expectContinue(true).POST(BodyPublishers.ofByteArray(body)).build(), BodyHandlers.ofString());
    print("expect", expecting, expecting.body());

    // Connections of their own, each with its offer.
    HttpClient fresh = HttpClient.newBuilder().version(HttpClient.Version.HTTP_2).build();
    List<CompletableFuture<HttpResponse<String>>> sent = new ArrayList<>();
    for (int i = 0; i < 8; i++) {
      sent.add(fresh.sendAsync(to(url).POST(BodyPublishers.ofByteArray(body)).build(), BodyHandlers.ofString()));
    }
    for (CompletableFuture<HttpResponse<String>> one : sent) {
      print("parallel", one.get(), one.get().body());
    }

    HttpResponse<java.util.stream.Stream<String>> lines =
        fresh.send(to(url).POST(BodyPublishers.ofByteArray(body)).build(), BodyHandlers.ofLines());
    print("lines", lines, lines.body().collect(Collectors.joining("|")));

    HttpResponse<Void> head =
        fresh.send(
            to(url).method("HEAD", BodyPublishers.noBody()).uri(URI.create(url).resolve("/health")).build(),
            BodyHandlers.discarding());
    print("head", head, head.headers().firstValue("content-length").orElse("none"));
  }
}
